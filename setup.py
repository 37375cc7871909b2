"""Builds the native module: g++ for the CPU, nvcc for CUDA, one link, by ninja."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# A CPU source is compiled for the instruction set that its name ends in.
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c",
    "_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "_avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c",
}
DEFAULT_ARCHS = "80;90a"
PTX_ARCH = "80"  # newer GPUs compile from it at load time; no pass of nvcc of its own

NINJA_RULES = """\
rule cxx
  command = {cxx} -MMD -MF $out.d {cxxflags} $isa -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $in
rule nvcc
  command = {nvcc} -MD -MF $out.d {nvccflags} -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA $in
rule link
  command = {linker} $in -o $out {ldflags}
  description = link $out
"""


def find_compiler() -> str:
    """The C++ compiler's command, or an error that says what to install."""
    command = os.environ.get("CXX") or "g++"
    if shutil.which(shlex.split(command)[0]) is None:
        raise SystemExit(
            f"adaptive: the C++ compiler {command!r} was not found. Install one (Debian, Ubuntu: "
            "apt install g++; Fedora: dnf install gcc-c++) or name yours in CXX."
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise SystemExit(
            "adaptive: Python.h was not found. Install the headers of this Python "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
        )
    return command


def find_nvcc() -> str | None:
    """Path of nvcc, or None for a build without CUDA. ADAPTIVE_CUDA=0|1 overrides."""
    wanted = os.environ.get("ADAPTIVE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"adaptive: ADAPTIVE_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if found is None and wanted == "1":
        raise SystemExit(
            "adaptive: ADAPTIVE_CUDA=1, but nvcc was not found. Install the CUDA toolkit (12.4 or "
            "later) and put nvcc on PATH, or set CUDA_HOME; or build without: ADAPTIVE_CUDA=0."
        )
    return found


def gencode_flags() -> str:
    """Flags for the architectures in ADAPTIVE_CUDA_ARCHS, such as "80;90a", and PTX for later."""
    archs = os.environ.get("ADAPTIVE_CUDA_ARCHS") or DEFAULT_ARCHS
    names = [name for name in archs.replace(",", ";").split(";") if name]
    for name in names:
        if not name.removesuffix("a").removesuffix("f").isdigit():
            raise SystemExit(
                f"adaptive: ADAPTIVE_CUDA_ARCHS must look like {DEFAULT_ARCHS!r}, got {archs!r}"
            )
    ptx = (PTX_ARCH,) if archs == DEFAULT_ARCHS else ()
    return " ".join(
        word(f"-gencode=arch=compute_{n},code=[sm_{n}{f',compute_{n}' * (n in ptx)}]")
        for n in names
    )


def word(argument: object) -> str:
    """One word of a command in build.ninja, whatever a path in it contains."""
    return shlex.quote(str(argument)).replace("$", "$$")


def path(file: Path) -> str:
    """A file as an input or output in build.ninja; ninja itself quotes $in and $out."""
    return re.sub(r"[$ :]", r"$\g<0>", str(file))


class NinjaBuild(build_ext):
    """Writes one build.ninja for the whole module and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext`` into the place where setuptools wants it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(self.ninja_file(target, objects))
        command = [sys.executable, "-m", "ninja", "-C", str(objects)]
        if subprocess.call(command + (["-v"] if self.verbose > 1 else [])) != 0:
            raise SystemExit(
                "adaptive: the native module did not compile; the compiler's message is above. "
                "It needs g++ 11 or clang 14 or later, and for CUDA nvcc 12.4 or later "
                "(ADAPTIVE_CUDA=0 builds without CUDA)."
            )

    def ninja_file(self, target: Path, objects: Path) -> str:
        """The text of build.ninja."""
        cxx, nvcc = find_compiler(), find_nvcc()
        folders = (CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])
        include = " ".join(word(f"-I{folder}") for folder in folders)
        cxxflags = (
            "-O3 -std=c++20 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra "
            f"{include} {'-DADAPTIVE_CUDA' if nvcc else ''} {os.environ.get('CXXFLAGS', '')}"
        )
        nvccflags = (
            f"-O3 -std=c++20 -Xcompiler -fPIC,-fvisibility=hidden {gencode_flags()} "
            + word(f"-I{CSRC}")
        )
        # nvcc on PATH may be a wrapper script: let it do the link, it knows where its cudart is.
        linker = (
            f"{word(nvcc)} -shared -cudart static -Xcompiler -fopenmp"
            if nvcc
            else f"{cxx} -shared -fopenmp"
        )
        lines = [
            NINJA_RULES.format(
                cxx=cxx,
                cxxflags=cxxflags,
                nvcc=word(nvcc),
                nvccflags=nvccflags,
                linker=linker,
                ldflags=os.environ.get("LDFLAGS", ""),
            )
        ]
        outputs = []
        # pybind11's headers cost more than all else in a binding: compile the bindings as one.
        bindings = objects / "all_bindings.cpp"
        bindings.write_text("".join(f'#include "{s.name}"\n' for s in sorted(CSRC.glob("*.cpp"))))
        sources = [bindings, *(CSRC / "cpu").glob("*.cpp")]
        if nvcc:
            sources += (CSRC / "cuda").glob("*.cu")
        for source in sorted(sources):
            output = objects / f"{source.parent.name}_{source.name}.o"
            isa = next((f for end, f in ISA_FLAGS.items() if source.stem.endswith(end)), "")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {path(output)}: {rule} {path(source)}\n  isa = {isa}")
            outputs.append(path(output))
        lines.append(f"build {path(target)}: link {' '.join(outputs)}\ndefault {path(target)}\n")
        return "\n".join(lines)


setup(ext_modules=[Extension("adaptive._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
