"""The rules of the house: who may import whom, how big a file may grow, what must not appear."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "patch": {"adapters", "layers", "patch_checks", "patched", "policy"},
    "patch_checks": {"layers", "policy"},
    "calibrate": {
        "calibrate_heads",
        "calibrate_layers",
        "calibrate_run",
        "layers",
        "patch",
        "policy",
    },
    "calibrate_run": {"calibrate_heads", "calibrate_layers", "layers"},
    "calibrate_heads": {"ops", "policy"},
    "calibrate_layers": {"ops", "policy"},
    "train": {"adapters", "layers", "policy"},
    "patched": {"adapters", "layers", "policy"},
    "zoo": {"layers", "ops"},  # models of our own: they need no patch, and so no policy or adapter
    "layers": {"policy", "ops"},
    "policy": {"ops"},
    "adapters": set(),
    "ops": set(),
}
"""Which parts of the package a part may use. The command line and the root may use all of it."""
SHARED = {"_native", "errors", "cpu_level", "progress"}
"""Leaves that every part may use: they import nothing of the package but each other."""
OUTERMOST = {"cli", "demo", "__main__"}
"""Nothing but these may import these."""
ONLY_IN = {
    "transformers": re.compile(r"layers/hf_\w+\.py|(cli|demo)/\w+\.py"),
    "matplotlib": re.compile(r"demo/_chart\.py"),
    "cupy": re.compile(r"ops/\w+\.py"),
}
"""Optional packages, and the files that may import them at all."""
FOREIGN = re.compile(r"torch|ATen|c10|pybind11|Python\.h")
MAX_LINES = {".py": 300, ".cu": 300, ".cuh": 300, ".h": 200, ".cpp": 200}
BANNED = re.compile(r"\bpickle\b|\btorch\.load\b|(?<![\w.])(eval|exec)\(")
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(root|home|work|opt|mnt)/\w")


def tracked(*suffixes):
    """Tracked files, and those not yet added that git would take."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [Path(line) for line in listing.splitlines()]
    wanted = (p for p in paths if not suffixes or p.suffix in suffixes)
    return sorted(p for p in wanted if (ROOT / p).is_file())


def package():
    return [p for p in tracked(".py") if p.parts[0] == "adaptive"]


def native():
    return [p for p in tracked(".h", ".cuh", ".cu", ".cpp") if p.parts[0] == "csrc"]


def imports(path):
    """Dotted names that a Python file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name):
    """Which part of the package a dotted name belongs to, or None."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "adaptive" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", package(), ids=str)
def test_imports_go_down(path):
    layer = path.parts[1].removesuffix(".py")
    targets = {part_of(name) for name in imports(path)} - {None, layer}
    if layer not in OUTERMOST:
        assert not targets & OUTERMOST, f"{layer} may not import {targets & OUTERMOST}"
    if layer in MAY_IMPORT:
        extra = targets - MAY_IMPORT[layer] - SHARED
        assert not extra, f"{layer} may import {MAY_IMPORT[layer]}, not {extra}"
    if layer in SHARED:
        assert targets <= SHARED, f"{layer} is a leaf and may not import {targets - SHARED}"


@pytest.mark.parametrize("path", package(), ids=str)
def test_optional_packages_stay_where_they_belong(path):
    inside = path.relative_to("adaptive").as_posix()
    for name in imports(path):
        allowed = ONLY_IN.get(name.split(".")[0])
        assert allowed is None or allowed.fullmatch(inside), f"{inside} may not import {name}"


def test_the_package_imports_without_optional_packages():
    """A user of plain PyTorch never pays for, and never needs, transformers."""
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {sorted(ONLY_IN)}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import adaptive, torch\n"
        "adaptive.patch(torch.nn.MultiheadAttention(64, 2).eval())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [p for p in native() if p.parts[1] in ("cpu", "cuda")], ids=str)
def test_kernels_know_nothing_of_torch(path):
    for include in re.findall(r"^#include\s+(\S+)", (ROOT / path).read_text(), re.MULTILINE):
        assert not FOREIGN.search(include), f"{path} may not include {include}"


@pytest.mark.parametrize("path", tracked(*MAX_LINES), ids=str)
def test_files_stay_small(path):
    limit = MAX_LINES[path.suffix]
    if path.name.endswith("_impl.h") or path.parts[0] == "tests":
        limit = 300
    lines = (ROOT / path).read_text().splitlines()
    assert len(lines) <= limit, f"{path} has {len(lines)} lines: a design question"


@pytest.mark.parametrize("path", tracked(*MAX_LINES), ids=str)
def test_first_line_says_what_the_file_is_for(path):
    lines = (ROOT / path).read_text().splitlines()
    start = lines[1] if lines[0].startswith("#!") else lines[0]
    comment = {".py": r'r?"""', ".pyi": "# "}.get(path.suffix, "// ")
    assert re.match(comment + r"\S.{11,}", start), f"{path} begins with {start!r}"


@pytest.mark.parametrize("path", package(), ids=str)
def test_nothing_in_a_file_can_run_code(path):
    """Plans and models are JSON and safetensors: reading one never executes anything."""
    found = BANNED.search((ROOT / path).read_text())
    assert found is None, f"{path} contains {found and found.group()!r}"


def test_no_path_of_a_particular_machine():
    for path in tracked():
        if (
            path.suffix in {".safetensors", ".png", ".npy", ".gz"}
            or path.name == Path(__file__).name
        ):
            continue
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), 1):
            found = MACHINE_PATH.search(line)
            assert found is None, f"{path}:{number}: {found and found.group()!r}"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (BANNED, "import pickle"),
        (BANNED, "x = torch.load(f)"),
        (BANNED, "eval(text)"),
        (MACHINE_PATH, "open('/home/someone/file')"),
        (FOREIGN, "<torch/extension.h>"),
        (FOREIGN, "<pybind11/pybind11.h>"),
    ],
)
def test_the_bans_catch_what_they_ban(pattern, text):
    assert pattern.search(text)


@pytest.mark.parametrize("text", ["model.eval()", "self.eval()", "evaluate(x)", "a/root/b"])
def test_the_bans_spare_what_they_do_not_mean(text):
    assert not BANNED.search(text)
    assert not MACHINE_PATH.search(text)
