"""The command line: ``python -m adaptive demo | check | bench``."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adaptive.cli._console import UsageError
from adaptive.errors import AdaptiveError

OK, UNSUPPORTED, USAGE, INTERRUPTED = 0, 1, 2, 130

TITLE = "adaptive: exact acceleration of PyTorch transformers, and proof of what it did"
TOP = """\
examples:
  python -m adaptive demo                  stock against patched: one model, one long document
  python -m adaptive check llama           is this architecture supported, and what is not?
  python -m adaptive check ./my-model      the same for a model folder (config.json is enough)
  python -m adaptive bench                 how fast is the native kernel on this machine?

exit codes: 0 ok, 1 `check` found the model unsupported, 2 usage error, 130 interrupted
with --json, stdout holds one JSON document and nothing else; progress goes to stderr
"""
DEMO = """\
What it does: plants a five-digit key in a long held-out document, lets the model read it and
generates the answer with stock transformers and with the patched model, in one process and in
turns. The tokens are compared first; then come the times, the memory (measured in processes of
their own) and a chart.

examples:
  python -m adaptive demo
  python -m adaptive demo --tokens 4000 --new-tokens 32     a shorter document
  python -m adaptive demo --dtype bfloat16                  half the KV memory
  python -m adaptive demo --json > result.json              numbers for a script
"""
CHECK = """\
MODEL is a folder with a config.json, or a model type of transformers such as llama or qwen3
(then its default configuration is used). No weights are read and nothing is downloaded.

examples:
  python -m adaptive check llama
  python -m adaptive check ./my-model --dtype bfloat16
  python -m adaptive check gemma2 --json | python -m json.tool
"""
BENCH = """\
First shows that the native kernel agrees with plain PyTorch in float64, then times it against
the fastest stock form, and a small random Llama model, patched against stock. About a minute.
The full benchmarks are in a checkout: python -m bench.ops, python -m bench.models.

examples:
  python -m adaptive bench
  python -m adaptive bench --threads 1 --dtype float32
  python -m adaptive bench --json > bench.json
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m adaptive", description=TITLE, epilog=TOP, formatter_class=layout
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=layout
        )
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return sub

    demo = command("demo", "stock against patched on a trained model and a long document", DEMO)
    demo.add_argument("--model", type=Path, metavar="DIR", help="default: the shipped lab model")
    demo.add_argument("--tokens", type=_count, metavar="N", help="document length (default 8000)")
    demo.add_argument("--new-tokens", type=_count, default=64, metavar="N", help="default 64")
    demo.add_argument("--depth", type=_fraction, default=0.35, metavar="0..1", help="of the needle")
    demo.add_argument("--seed", type=int, default=0, help="picks the text and the key")
    demo.add_argument("--rounds", type=_count, default=3, help="timed rounds (default 3)")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="for the chart")
    check = command("check", "say whether a model is supported, and what is missing", CHECK)
    check.add_argument("model", metavar="MODEL", help="a folder or a model type")
    bench = command("bench", "a short benchmark of this machine", BENCH)
    for sub, default in ((demo, "float32"), (check, "float32"), (bench, "bfloat16")):
        sub.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"), default=default,
            help=f"default {default}",
        )  # fmt: skip
    for sub in (demo, bench):
        sub.add_argument("--threads", type=_count, metavar="N", help="default: torch's choice")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Mistakes of the user end without a traceback."""
    options = build_parser().parse_args(argv)
    err = Console(stderr=True)
    try:
        result, show, code = _run(options, err)
    except KeyboardInterrupt:
        err.print("interrupted")
        return INTERRUPTED
    except (UsageError, AdaptiveError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        return USAGE
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(Console() if sys.stdout.isatty() else Console(width=110))
    return code


def _run(
    options: argparse.Namespace, err: Console
) -> tuple[dict[str, Any], Callable[[Console], None], int]:
    """Run the command; return its result as JSON values, a printer of it, and the exit code."""
    # Imported here so that `--help` and usage errors do not wait for transformers.
    if options.command == "check":
        from adaptive.cli import _check

        support = _check.run(options.model, options.dtype)
        return _check.to_dict(support), support.show, OK if support.ok else UNSUPPORTED
    if options.command == "bench":
        from adaptive.cli import _bench

        timings = _bench.run(options.dtype, options.threads, err)
        return timings.to_dict(), timings.show, OK
    from adaptive import demo

    result = demo.run(
        demo.Options(
            model=options.model,
            tokens=options.tokens,
            new_tokens=options.new_tokens,
            depth=options.depth,
            seed=options.seed,
            rounds=options.rounds,
            dtype=options.dtype,
            threads=options.threads,
            out=options.out,
        ),
        err,
    )
    return result.to_dict(), result.show, OK


def _count(text: str) -> int:
    """Parse an integer of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value
