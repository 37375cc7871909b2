"""The table of a skip search result file: what sets gained that were found while decoding."""

from bench.markdown import Document, machine_line, render

_COLUMNS = {
    "search": "search, from nothing",
    "draws alone": "by draws alone",
    "found sets": "found sets",
    "found sets, 6 drafts": "found sets, 6 drafts",
    "every second layer, 6 drafts": "every second layer, 6 drafts",
}


def skip_search_table(document: Document) -> str:
    """Per text: a search that begins with the call, and sets that are ready."""
    rows = []
    for row in document["rows"]:
        cells = []
        for name in _COLUMNS:
            variant = row["variants"][name]
            share = variant["acceptance"]
            accepted = "no drafts" if share is None else f"{share:.0%} accepted"
            cells.append(f"{variant['speedup']:.2f}x, {accepted}")
        search = row["variants"]["search"]
        cost = f"{search['candidates']:.0f} in {search['search_share']:.1%} of the time"
        rows.append([row["text"], *cells, cost, f"{row['variants']['exact']['ms']:.0f} ms"])
    settings = document["settings"]
    return (
        render(["text", *_COLUMNS.values(), "candidates", "exact path"], rows)
        + f"\n\nLab model, prompts of {settings['prompt']} tokens, {settings['tokens']} new ones, "
        + "all equal to those of the exact path; a search begins with its call, "
        + f"its time included; median CPU time, {settings['threads']} thread. "
        + machine_line(document)
    )
