"""The documentation is true: every Python block runs, every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")]
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TABLE = re.compile(r"<!-- table:(begin|end) (\w+) -->")


def name(page):
    return page.relative_to(ROOT).as_posix()


def headings(page):
    """The anchors that a page offers, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_python_blocks_run(page, monkeypatch):
    """Blocks of one page run in order and share their names, as a reader would type them."""
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    scope = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        # Blank lines before the block make a traceback point at the line of the page.
        padding = "\n" * text[: match.start(1)].count("\n")
        exec(compile(padding + match.group(1), str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor in headings(there), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_have_both_markers(page):
    marks = TABLE.findall(page.read_text())
    assert [kind for kind, _ in marks] == ["begin", "end"] * (len(marks) // 2)
    assert [n for kind, n in marks if kind == "begin"] == [n for kind, n in marks if kind == "end"]


def test_the_first_screen_has_what_it_must():
    """Sentence, picture, install and code come before the first speed."""
    text = (ROOT / "README.md").read_text()
    order = [text.index(s) for s in ("**One call", "![", "pip install", "```python", "table:begin")]
    assert order == sorted(order)
    assert len(text[: order[-1]].splitlines()) < 45


def test_every_page_is_linked_from_the_readme():
    linked = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} <= linked
