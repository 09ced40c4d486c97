"""Tables for people at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from .evaluation import Evaluation


def returns_table(title: str, evaluations: dict[str, dict[str, Evaluation]]) -> Table:
    """Family × (sampled, greedy): mean return ± 95 % confidence interval, and the worst learner."""
    from rich.table import Table

    first = next(iter(next(iter(evaluations.values())).values()))
    learners, episodes = first.returns.shape
    table = Table(
        title=title,
        caption=f"mean ± 95 % CI [worst] of {learners} fresh learners after one step, {episodes} episode(s) each",
    )
    table.add_column("family")
    kinds = [kind for kind in ("sampled", "greedy") if any(kind in entry for entry in evaluations.values())]
    for kind in kinds:
        table.add_column(kind, justify="right")
    for family, entry in evaluations.items():
        cells = [f"{e.mean:.1f} ± {e.ci95:.1f} [{e.worst:.1f}]" for kind in kinds if (e := entry.get(kind))]
        table.add_row(family, *cells)
    return table
