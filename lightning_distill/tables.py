"""Tables for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .returns import IN_DISTRIBUTION

if TYPE_CHECKING:
    from rich.table import Table

    from .returns import Evaluation

Evaluations = Mapping[str, Mapping[str, "Evaluation"]]


def returns_table(title: str, evaluations: Evaluations, players: str = "fresh learners after one step") -> Table:
    """A row for each family and kind of action: mean ± 95 % CI, std, interquartile mean, worst learner, share.

    The caption says how many ``players`` there were: what statistics are over.
    """
    from rich.markup import escape
    from rich.table import Table

    found = rows(evaluations)
    table = Table(
        title=escape(title), caption=f"{found[0]['learners']} {players}, {found[0]['episodes']} episode(s) each"
    )
    for column in ("family", "actions"):
        table.add_column(column)
    for column in ("return ± 95 % CI", "std", "IQM", "worst"):
        table.add_column(column, justify="right")
    if any(row["share"] is not None for row in found):
        table.add_column("share", justify="right")
    for row in found:
        cells = [f"{row['mean']:.1f} ± {row['ci95']:.1f}", *(f"{row[name]:.1f}" for name in ("std", "iqm", "worst"))]
        share = [] if row["share"] is None else [f"{row['share']:.0%}"]
        table.add_row(escape(row["family"]), row["actions"], *cells, *share)
    return table


def rows(evaluations: Evaluations) -> list[dict[str, Any]]:
    """What is said of each family and kind of action: ``family``, ``actions``, an evaluation's ``as_dict()``, ``share`` (or None)."""
    return [
        {"family": family, "actions": kind, **entry.as_dict(), "share": shares(evaluations, kind).get(family)}
        for family, kinds in evaluations.items()
        for kind, entry in kinds.items()
    ]


def shares(evaluations: Evaluations, kind: str) -> dict[str, float]:
    """Every other row's share of the in-distribution return; none if that is missing or not positive."""
    reference = evaluations.get(IN_DISTRIBUTION, {}).get(kind)
    if reference is None:
        return {}
    others = {family: entry for family, entry in evaluations.items() if family != IN_DISTRIBUTION and kind in entry}
    found = {family: entry[kind].share(reference) for family, entry in others.items()}
    return {family: share for family, share in found.items() if share is not None}
