"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random inputs."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ISA = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FLAGS = ["-std=c++20", "-O1", "-g1", "-fopenmp", f"-I{ROOT / 'csrc'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    objects = tmp_path_factory.mktemp("sanitized")
    # The driver's own arithmetic need not be watched: its buffers are, all the same.
    outputs, running = [], []
    for source in sorted((ROOT / "tests/native").glob("*.cpp")):
        outputs.append(objects / f"{source.stem}.o")
        running.append(subprocess.Popen(["g++", *FLAGS, "-c", source, "-o", outputs[-1]]))
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        isa = next((flags for end, flags in ISA.items() if source.stem.endswith(end)), [])
        if isa and platform.machine() != "x86_64":
            continue
        outputs.append(objects / f"{source.stem}.o")
        command = ["g++", *FLAGS, *SANITIZERS, *isa, "-c", source, "-o", outputs[-1]]
        running.append(subprocess.Popen(command))
    assert [process.wait() for process in running] == [0] * len(running)
    program = objects / "driver"
    subprocess.run(["g++", "-fopenmp", *SANITIZERS, *outputs, "-o", program], check=True)
    return program


@pytest.mark.slow
def test_random_inputs_are_right_and_clean(driver):
    done = subprocess.run(
        [driver, "1", "1000"],
        env={"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "0 wrong rows" in done.stdout
