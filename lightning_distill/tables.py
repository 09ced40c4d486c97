"""Tables for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .evaluation import IN_DISTRIBUTION

if TYPE_CHECKING:
    from rich.table import Table

    from .evaluation import Evaluation

Evaluations = Mapping[str, Mapping[str, "Evaluation"]]


def returns_table(title: str, evaluations: Evaluations, players: str = "fresh learners after one step") -> Table:
    """A row for each family and kind of action: mean ± 95 % CI, std, interquartile mean, worst learner, share.

    The caption says how many ``players`` there were: what statistics are over.
    """
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(next(iter(evaluations.values())).values()))
    learners, episodes = first.returns.shape
    table = Table(title=escape(title), caption=f"{learners} {players}, {episodes} episode(s) each")
    for column in ("family", "actions"):
        table.add_column(column)
    for column in ("return ± 95 % CI", "std", "IQM", "worst"):
        table.add_column(column, justify="right")
    kinds = [kind for kind in ("sampled", "greedy") if any(kind in entry for entry in evaluations.values())]
    share_of = {kind: shares(evaluations, kind) for kind in kinds}
    if any(share_of.values()):
        table.add_column("share", justify="right")
    for family, entry in evaluations.items():
        for kind in kinds:
            if kind not in entry:
                continue
            e = entry[kind]
            cells = [f"{e.mean:.1f} ± {e.ci95:.1f}", f"{e.std:.1f}", f"{e.iqm:.1f}", f"{e.worst:.1f}"]
            share = share_of[kind].get(family)
            table.add_row(escape(family), kind, *cells, *([] if share is None else [f"{share:.0%}"]))
    return table


def shares(evaluations: Evaluations, kind: str) -> dict[str, float]:
    """Every other row's share of the in-distribution return; none if that is missing or not positive."""
    reference = evaluations.get(IN_DISTRIBUTION, {}).get(kind)
    if reference is None or reference.mean <= 0:
        return {}
    return {
        family: entry[kind].share(reference)
        for family, entry in evaluations.items()
        if family != IN_DISTRIBUTION and kind in entry
    }
