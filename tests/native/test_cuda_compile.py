"""CUDA sources compile without a warning for the oldest and newest target, and without spills."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TARGETS = ["80", "90a"]
KERNELS = {
    "combine_tokens.cu": [*["add_rows"] * 3, *["copy_rows"] * 3],
    "decode_attention.cu": ["attend_fma"] * 3,
    "decode_attention_mma.cu": ["attend_mma"] * 6,
    "device.cu": [],
    "exit_confidence.cu": [*["summarise_slice"] * 18, "merge_slices"],
    "gather_attention.cu": ["attend_fma"] * 3,
    "gather_attention_mma.cu": ["attend_mma"] * 6,
    "gather_tokens.cu": ["gather_rows"] * 2,
    "local_attention.cu": ["attend_local"] * 3,
    "local_attention_mma.cu": ["attend_local"] * 6,
    "merge_tokens.cu": [*["match_sources"] * 3, "place_tokens", *["average"] * 3],
    "plan.cu": ["merge_rows"],
    "pool_blocks.cu": ["pool_rows"] * 3,
    "prefix_row_ffn.cu": [*["activate_neurons"] * 9, *["project_rows"] * 9],
    "route_tokens.cu": ["route_rows"],
    "router_scores.cu": ["score_rows"] * 3,
    "score_tokens.cu": ["reduce_scores", *["attend_fma"] * 6],
    "score_tokens_mma.cu": ["attend_mma"] * 12,
    "select_tokens.cu": ["prepare", "measure", "count", "write", *["descend"] * 6],
    "skinny_linear.cu": ["multiply_rows"] * 18,
    "sparse_row_ffn.cu": [*["multiply_active"] * 6, *["add_parts"] * 3],
    "sum_tokens.cu": ["sum_rows"] * 3,
    "tree_attention.cu": ["attend_fma"] * 3,
    "tree_attention_mma.cu": ["attend_mma"] * 6,
    "verify_draft.cu": ["walk_draft"],
    "verify_samples.cu": ["sample_draft"],
}
"""The kernels of each file, without their template arguments; ptxas reports on each per target."""
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<target>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


@pytest.fixture(scope="module")
def ptxas_report(request, tmp_path_factory):
    """Compiles a source and returns what ptxas says; kept while no source changes."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    texts = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cu"))
    digest = hashlib.sha256(version + b"".join(p.read_bytes() for p in texts)).hexdigest()[:24]

    def report(source):
        kept = request.config.cache.mkdir("ptxas") / f"{source.stem}-{digest}"
        if kept.exists():
            return kept.read_text()
        flags = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in TARGETS]
        target = tmp_path_factory.mktemp("nvcc") / "object.o"
        done = subprocess.run(
            [
                nvcc, "-std=c++20", "-O3", *flags, f"-I{CSRC}", "-Werror", "all-warnings",
                "-Xptxas", "-v,-warn-spills", "-Xcompiler", "-fPIC",
                "-c", str(source), "-o", str(target),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        kept.write_text(done.stderr)
        return done.stderr

    return report


def test_every_source_is_listed():
    assert [source.name for source in SOURCES] == sorted(KERNELS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_kernels_keep_everything_in_registers(ptxas_report, source):
    entries = [match.groupdict() for match in ENTRY.finditer(ptxas_report(source))]
    for target in TARGETS:
        names = [entry["name"] for entry in entries if entry["target"] == target]
        expected = KERNELS[source.name]
        assert len(names) == len(expected), f"sm_{target} has {names}"
        assert all(any(kernel in name for name in names) for kernel in expected)
    for entry in entries:
        used = {key: entry[key] for key in ("stack", "stores", "loads")}
        assert set(used.values()) == {"0"}, f"{entry['name']} for sm_{entry['target']}: {used}"
