"""Pictures of a run and of a dataset, drawn without a display."""

from __future__ import annotations

import csv
from pathlib import Path

from .dataset import DistilledDataset


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_learning_curve(metrics: Path, path: Path) -> Path:
    """Return against environment steps, from a run's ``metrics.csv``: acting policies, fresh learners, held-out ones."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = _figure(7, 4)
    axes = figure.subplots()
    columns = [name for name in (rows[0] if rows else {}) if name in ("return", "val/return")]
    columns += sorted(
        name for name in (rows[0] if rows else {}) if name.startswith("held_out/") and name.endswith("/return")
    )
    steps = 0.0
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    for row in rows:
        # A validation's row comes without the counter: it belongs to the steps counted just before it.
        steps = float(row["env_steps"]) if row.get("env_steps") else steps
        for name in columns:
            if row.get(name):
                points[name].append((steps, float(row[name])))
    labels = {"return": "acting learners (last 100 episodes)", "val/return": "fresh learners"}
    for name, line in points.items():
        if line:
            label = labels.get(name, "held out: " + name.removeprefix("held_out/").removesuffix("/return"))
            axes.plot(*zip(*line, strict=True), marker="" if name == "return" else "o", markersize=3, label=label)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.grid(alpha=0.3)
    if any(points.values()):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def draw_pairs(dataset: DistilledDataset, path: Path) -> Path:
    """The pairs as two heat maps side by side: observations as learners are fed them, and targets."""
    figure = _figure(9, min(12.0, 1.6 + 0.16 * dataset.pairs))
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    panels = (
        (left, dataset.observations.flatten(1), "observations (normalised)", "entry"),
        (right, dataset.targets, "targets", "logit of action" if dataset.action_type == "discrete" else "action mean"),
    )
    for axes, values, title, label in panels:
        limit = max(values.abs().max().item(), 1e-6)
        image = axes.imshow(
            values.cpu(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.set_ylabel("pair")
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{dataset.env}: {dataset.pairs} pairs, learning rate {dataset.learning_rate.item():.3g}")
    figure.savefig(path, dpi=120)
    return path
