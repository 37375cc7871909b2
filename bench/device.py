"""One command for a machine with a GPU: python -m bench.device.

Builds with CUDA, runs every test on the GPU, repeats the CUDA ones under compute-sanitizer, then
runs the benchmarks and writes ``bench/results/<date>-<gpu>.json``. Stops at the first step that
fails, except the sanitizer where it is not installed. This script has not been run yet: it was
written on a machine without a GPU, as were the CUDA paths of the benchmarks that it calls.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(title: str, *command: str, **environment: str) -> None:
    """Run one step in the repository root; exit with its status if it fails."""
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if done.returncode != 0:
        sys.exit(f"bench.device: {title} failed with status {done.returncode}")


def gpu_name() -> str:
    """Name of the first GPU, fit for a file name, from a fresh process."""
    code = "import torch; print(torch.cuda.get_device_name(0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(
            "bench.device: torch must see a GPU, got: " + done.stderr.strip().rpartition("\n")[2]
        )
    return re.sub(r"[^a-z0-9]+", "-", done.stdout.strip().lower()).strip("-")


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("--skip", nargs="+", default=[], choices=["build", "tests", "sanitizer"])
    options = parser.parse_args()
    gpu = gpu_name()
    python = sys.executable
    if "build" not in options.skip:
        install = (python, "-m", "pip", "install", "--no-build-isolation", "-e", ".")
        run("build", *install, ADAPTIVE_CUDA="1")
    run("CUDA is built", python, "-c", "from adaptive import _native; assert _native.cuda")
    if "tests" not in options.skip:
        run("tests", python, "-m", "pytest", "tests", "-q")
    if "sanitizer" not in options.skip:
        if shutil.which("compute-sanitizer"):
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
                check = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
                wanted = ("-m", "pytest", "tests/ops", "-q", "-k", "cuda", "-p", "no:cacheprovider")
                run(tool, *check, python, *wanted, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        else:
            print("compute-sanitizer is not on PATH: skipped", flush=True)
    date = datetime.datetime.now(datetime.timezone.utc).date()
    result = Path("bench") / "results" / f"{date}-{gpu}.json"
    run("benchmarks", python, "-m", "bench.ops", "--device", "cuda", "--json", str(result))
    steps = Path("bench") / "results" / f"{date}-{gpu}-static-speculation.json"
    static = ("-m", "bench.static_speculation", "--shape", "8b", "--device", "cuda")
    run("static steps", python, *static, "--json", str(steps))
    print(f"\nwrote {result} and {steps}")


if __name__ == "__main__":
    main()
