"""A run on one page: ``report.html``, which opens anywhere, holds all it shows and asks the network for nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .dataset import DistilledDataset, write_atomically
from .pictures import Curves, draw_returns, label_curves, new_figure
from .tables import Evaluations, rows

#: Title and curves (metric → label) of each panel; W&B groups the same metrics by what stands before their slash.
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("step size η of the one step", {"policy/learning_rate": ""}),
    ("KL divergence and share of clipped samples", {"policy/kl": "KL", "policy/clip_fraction": "clipped"}),
    ("entropy of the acting policies", {"policy/entropy": ""}),
    ("log standard deviation of actions", {"policy/log_std": ""}),
    ("explained variance of the critic", {"loss/explained_variance": ""}),
    ("gradient norms before clipping", {"gradient/actor": "actor (synthetic batch)", "gradient/critic": "critic"}),
    ("environment steps a second", {"steps/s": ""}),
)
TIME = {"time/simulation": "simulation", "time/inference": "inference", "time/update": "update"}
SNAPSHOTS = 6

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;background:#fff;max-width:1080px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.6rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #dde3ea}
p.lead{color:#56616f;margin-top:0}img{max-width:100%;height:auto;display:block}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .8rem;text-align:right}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
thead th{border-bottom:2px solid #1c2430}tbody tr:nth-child(even){background:#f4f6f9}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem}dt{color:#56616f}dd{margin:0;overflow-wrap:anywhere}
pre{background:#f4f6f9;padding:.8rem 1rem;overflow-x:auto;font-size:13px}summary{cursor:pointer;color:#2060c0}
"""


def write_report(
    path: Path,
    title: str,
    lead: str,
    evaluations: Evaluations,
    *,
    players: str,
    curves: Curves | None = None,
    pairs_picture: Path | None = None,
    snapshots: Sequence[DistilledDataset] = (),
    environment: Mapping[str, Any] | None = None,
    config: str = "",
    files: Iterable[tuple[Path, str]] = (),
) -> Path:
    """Write the page.

    Args:
        path: of the page.
        title, lead: what the run was, in a few words and in a line.
        evaluations: {family: {sampled|greedy: evaluation}}.
        players: who they are returns of.
        curves: from :func:`lightning_distill.pictures.read_curves`.
        pairs_picture: a PNG.
        snapshots: the dataset as it was at each validation.
        environment: from :func:`lightning_distill.provenance.describe_run`.
        config: the YAML.
        files: (path, meaning) of what else the run left.
    """
    parts = [f"<h1>{_text(title)}</h1><p class=lead>{_text(lead)}</p>"]
    if evaluations:
        parts.append(_section(f"Returns of {players}", _returns(evaluations)))
    if curves:
        parts.append(_section("Learning, against environment steps", _image(draw_curves(curves), "learning curves")))
    if pairs_picture is not None and pairs_picture.is_file():
        parts.append(_section("The pairs", _picture("png", pairs_picture.read_bytes(), "the pairs")))
    if len(snapshots) > 1:
        parts.append(_section("The pairs over time", _image(draw_snapshots(snapshots), "the pairs over time")))
    if environment:
        parts.append(_section("Made with", _made_with(environment)))
    if config:
        parts.append(_section("Config", f"<details><summary>all of it</summary><pre>{_text(config)}</pre></details>"))
    listed = [(str(file), meaning) for file, meaning in files]
    if listed:
        parts.append(_section("Files", _definitions(listed)))
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>"
    )
    return write_atomically(path, f"{head}<body>{''.join(parts)}</body></html>".encode())


def draw_curves(curves: Curves):
    """All that was logged over the run, against environment steps, as one figure."""
    shown = [(title, lines) for title, lines in PANELS if any(name in curves for name in lines)]
    timed = all(name in curves for name in TIME)
    rows = 2 + (len(shown) + timed + 1) // 2
    figure = new_figure(11, 2.3 * rows)
    grid = figure.add_gridspec(rows, 2)
    draw_returns(figure.add_subplot(grid[:2, :]), curves)
    panels = iter(figure.add_subplot(grid[2 + index // 2, index % 2]) for index in range(len(shown) + timed))
    for (title, lines), axes in zip(shown, panels, strict=False):
        for name, label in lines.items():
            if name in curves:
                axes.plot(*zip(*curves[name], strict=True), label=label, linewidth=1)
        if any(lines.values()):
            axes.legend(fontsize="small")
        if all(value > 0 for name in lines for _, value in curves.get(name, ())) and title.startswith("gradient"):
            axes.set_yscale("log")
        label_curves(axes, title)
    if timed:
        axes = next(panels)
        steps = [step for step, _ in curves["time/update"]]
        axes.stackplot(steps, [[share for _, share in curves[name]] for name in TIME], labels=TIME.values(), alpha=0.8)
        axes.set_ylim(0, 1.3)
        axes.legend(fontsize="small", loc="upper center", ncols=3)
        label_curves(axes, "share of time")
    return figure


def draw_snapshots(snapshots: Sequence[DistilledDataset]):
    """Heat maps of observations and targets at up to ``SNAPSHOTS`` times, on one scale each."""
    count = min(SNAPSHOTS, len(snapshots))
    chosen = [snapshots[round(index * (len(snapshots) - 1) / max(count - 1, 1))] for index in range(count)]
    figure = new_figure(11, 4.4)
    panels = figure.subplots(2, count, squeeze=False)
    for row, name in zip(panels, ("observations", "targets"), strict=True):
        values = [getattr(dataset, name).flatten(1).cpu().numpy() for dataset in chosen]
        limit = max(1e-6, *(abs(value).max() for value in values))
        for axes, value, dataset in zip(row, values, chosen, strict=True):
            image = axes.imshow(value, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if name == "observations":
                axes.set_title(f"{dataset.metadata['env_steps']:,} steps", fontsize="small")
        row[0].set_ylabel(name)
        figure.colorbar(image, ax=row[-1])
    return figure


# --- HTML ---------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>{content}"


def _picture(kind: str, content: bytes, alt: str) -> str:
    return f'<img alt="{_text(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _image(figure: Any, alt: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _picture("svg+xml", content.getvalue(), alt)


def _definitions(entries: Iterable[tuple[str, Any]]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in entries) + "</dl>"


def _made_with(environment: Mapping[str, Any]) -> str:
    entries = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items() if entry is not None)
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        if value:
            entries.append((name.replace("_", " "), value))
    return _definitions(entries)


def _returns(evaluations: Evaluations) -> str:
    columns = ("family", "actions", "return", "± 95 % CI", "std", "IQM", "worst", "learners", "share")
    lines = []
    for row in rows(evaluations):
        numbers = [f"{row[name]:,.1f}" for name in ("mean", "ci95", "std", "iqm", "worst")]
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        cells = [row["family"], row["actions"], *numbers, row["learners"], share]
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
