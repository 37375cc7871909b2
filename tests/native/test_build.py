"""The build: what it refuses and how it says so; the wheel stands on its own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(tmp_path, root=ROOT, **environment):
    """Build ``root`` into ``tmp_path`` and return (exit code, all that it printed)."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "o", "--build-lib",
         tmp_path / "lib"],
        cwd=root, env={**os.environ, "ADAPTIVE_CUDA": "0", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "'no-such-compiler' was not found. Install one"),
        ({"ADAPTIVE_CUDA": "yes"}, "ADAPTIVE_CUDA must be 0 or 1, got 'yes'"),
        ({"ADAPTIVE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc was not found"),
    ],
)
def test_a_wrong_environment_is_explained(tmp_path, environment, message):
    code, printed = build(tmp_path, **environment)
    assert code != 0
    assert message in printed
    assert "Traceback" not in printed


def test_make_looks_for_the_compiler_that_the_build_uses(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler -O2"}
    done = subprocess.run(
        ["make", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", "TORCH=--version",
         tmp_path / "venv" / "torch.txt"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "The C++ compiler 'no-such-compiler -O2' was not found" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_a_wrong_architecture_is_explained(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    code, printed = build(
        tmp_path, ADAPTIVE_CUDA="1", CUDA_HOME=str(tmp_path), ADAPTIVE_CUDA_ARCHS="80;hopper"
    )
    assert code != 0
    assert "ADAPTIVE_CUDA_ARCHS must look like '80;90a', got '80;hopper'" in printed


def test_a_failing_compiler_is_explained(tmp_path):
    code, printed = build(tmp_path, CXX="false")
    assert code != 0
    assert "the native module did not compile; the compiler's message is above" in printed


def test_a_path_may_have_spaces(tmp_path):
    root = tmp_path / "a folder: $5"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copy(ROOT / "setup.py", root)
    compiler = tmp_path / "compiler"  # sees a header through -I, and writes what it is told to
    compiler.write_text(
        "#!/bin/sh\nfound=\n"
        "for word; do\n"
        '  [ -f "${word#-I}/check.h" ] && found=yes\n'
        '  case "$last" in -o) echo > "$word" ;; -MF) echo "x:" > "$word" ;; esac\n'
        "  last=$word\n"
        "done\n"
        'case " $* " in *" -shared "*) exit 0 ;; esac\n'
        '[ "$found" ]\n'
    )
    compiler.chmod(0o755)
    code, printed = build(root / "build it", root, CXX=str(compiler))
    assert code == 0, printed
    assert list((root / "build it" / "lib").rglob("_native*.so"))


def test_an_empty_variable_is_as_good_as_none(tmp_path):
    code, printed = build(tmp_path, CXX="", PATH="/nowhere")
    assert code != 0
    assert "the C++ compiler 'g++' was not found" in printed


@pytest.mark.slow
def test_a_wheel_builds_in_isolation_and_imports(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT],
        env={**os.environ, "ADAPTIVE_CUDA": "0", "CXXFLAGS": "-O1"}, check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("adaptive-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "adaptive/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "csrc/"))]
    script = (
        "import adaptive, torch, sys; from adaptive.ops import decode_attention as f\n"
        "q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 9, 64)\n"
        "with torch.no_grad(): torch.testing.assert_close(f(q, k, k), f.reference(q, k, k))\n"
        "assert 'transformers' not in sys.modules, 'a plain-torch user paid for transformers'\n"
        "print(adaptive.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
