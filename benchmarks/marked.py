"""Tables in Markdown, written between two marks of a document by whoever measures: never by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "RESULTS.md"
EXPERIMENTS = RESULTS.parent / "docs" / "experiments.md"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def interval(entry: Mapping[str, Any]) -> str:
    """Mean and confidence interval of what a file states of its returns."""
    return f"{entry['mean']:.1f} ± {entry['ci95']:.1f}"


def write(name: str, content: str, document: Path = RESULTS) -> None:
    """Print ``content``; where a document has the marks ``<!-- name: begin -->`` and ``<!-- name: end -->``, put it between them."""
    print(content)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    document.write_text(re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", document.read_text(), flags=re.DOTALL))
