"""What the tables made of result files share."""

from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]


def tokens_label(tokens: int) -> str:
    """16384 -> 16k; 256 -> 256."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    align = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, align, *rows))


def machine_line(document: Document) -> str:
    """One sentence on where and how the numbers were made."""
    machine = document["machine"]
    versions = machine["versions"]
    read = document.get("bandwidth_gb_s", {})
    speeds = ", ".join(
        f"{value:.1f} GB/s with {n} thread{'s' * (n != '1')}" for n, value in sorted(read.items())
    )
    bandwidth = f", measured read bandwidth {speeds}" if speeds else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{bandwidth}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        f"transparent huge pages: {machine['huge_pages']}; commit `{machine['commit']}`, "
        f"{machine['date'][:10]}."
    )
