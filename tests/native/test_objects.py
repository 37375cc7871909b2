"""What is compiled for AVX stays out of files that must run on every CPU."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from instruction_sets import flags_of

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
BASELINE = [f for f in sorted(CPU.glob("*.cpp")) if not flags_of(f)]
ABOVE = [f for f in sorted(CPU.glob("*.cpp")) if flags_of(f)]

# An AVX instruction starts with v (no SSE one does, but verr and verw) or names a wide register.
AVX = re.compile(r"^\s+[0-9a-f]+:\s+(v(?!err|erw)\w+|.*%[yz]mm)", re.MULTILINE)

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, ("g++", "objdump", "nm"))),
    reason="needs x86-64, g++ and binutils",
)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def compiled(request, tmp_path):
    """The object of a source. Hardly optimised: what is not inlined shows."""
    source = request.param
    isa = flags_of(source)
    made = tmp_path / f"{source.stem}.o"
    flags = ["-std=c++20", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w"]
    run("g++", *flags, f"-I{ROOT / 'csrc'}", *isa, "-c", source, "-o", made)
    return made


def disassembly(path):
    return run("objdump", "-d", "--no-show-raw-insn", path)


@pytest.mark.parametrize("compiled", BASELINE, indirect=True, ids=lambda f: f.name)
def test_baseline_objects_hold_no_avx(compiled):
    assert not AVX.findall(disassembly(compiled))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ABOVE, indirect=True, ids=lambda f: f.name)
def test_other_objects_export_their_entries_alone(compiled):
    """No weak copy of a shared function, and nothing that runs when the module is loaded."""
    symbols = [line.split()[-2:] for line in run("nm", "--defined-only", compiled).splitlines()]
    visible = [each for each in symbols if each[0] not in "tTrRdDbBnN" or each[0].isupper()]
    assert visible
    level = compiled.stem.rsplit("_")[-1]
    assert all(kind in "TRD" and level in name.lower() for kind, name in visible)
    undefined = {line.split()[-1] for line in run("nm", "-u", compiled).splitlines()}
    of_c = {"memcpy", "memset", "sqrtf", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}
    assert undefined <= of_c
    assert ".init_array" not in run("objdump", "-h", compiled)
    assert AVX.search(disassembly(compiled))
