"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random inputs."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from instruction_sets import flags_of

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fopenmp", f"-I{ROOT / 'csrc'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


INPUTS = {"driver": 1000, "local_driver": 300}
"""Programs that feed the kernels, and on how many random inputs."""


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """The programs by name."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    objects = tmp_path_factory.mktemp("sanitized")
    kernels, commands = [], []
    # The drivers' own arithmetic need not be watched: their buffers are, all the same.
    for name in INPUTS:
        source, output = ROOT / f"tests/native/{name}.cpp", objects / f"{name}.o"
        commands.append(["g++", *FLAGS, "-c", source, "-o", output])
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        isa = flags_of(source)
        if isa and platform.machine() != "x86_64":
            continue
        kernels.append(objects / f"{source.stem}.o")
        commands.append(["g++", *FLAGS, *SANITIZERS, *isa, "-c", source, "-o", kernels[-1]])
    with ThreadPoolExecutor(2) as pool:  # all at once would need many times the memory
        for done in pool.map(lambda command: subprocess.run(command, check=False), commands):
            assert done.returncode == 0
    programs = {name: objects / name for name in INPUTS}
    for name, program in programs.items():
        own = objects / f"{name}.o"
        subprocess.run(["g++", "-fopenmp", *SANITIZERS, own, *kernels, "-o", program], check=True)
    return programs


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_random_inputs_are_right_and_clean(drivers, name):
    done = subprocess.run(
        [drivers[name], "1", str(INPUTS[name])],
        env={"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "0 wrong rows" in done.stdout
