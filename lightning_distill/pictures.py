"""Pictures of a run and of a dataset, drawn without a display."""

from __future__ import annotations

import csv
import logging
import math
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .dataset import DistilledDataset
from .nature import FRAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

logger = logging.getLogger(__name__)

CART_POLE = re.compile(r"CartPole-v1|CartPole\dD-v0")
#: Pairs that are drawn as what they mean; heat maps show all.
CART_PAIRS, POSES, FRAME_ROWS = 12, 64, 18
#: One cart-pole's cell in metres; half the track; colour of what targets say.
CELL_WIDTH, CELL_HEIGHT, TRACK, PUSH = 5.6, 2.5, 2.4, "#2060c0"
#: Inches.
WIDTH = 12
#: Height of the bars below a pose, as a share of its own.
BARS = 0.3


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


#: Metric → [(environment steps, value)].
Curves = dict[str, list[tuple[float, float]]]


def read_curves(metrics: Path) -> Curves:
    """All that a run's ``metrics.csv`` holds, against environment steps; numbers that are not finite are left out."""
    steps, curves = 0.0, {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            # A validation's row comes without the counter: it belongs to the steps counted just before it.
            steps = float(row["env_steps"]) if row.get("env_steps") else steps
            for name, value in row.items():
                if value and math.isfinite(float(value)):
                    curves.setdefault(name, []).append((steps, float(value)))
    return curves


def draw_learning_curve(curves: Curves, path: Path) -> Path:
    """Return against environment steps, of a run's curves: training, validation, held-out learners."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    draw_returns(axes, curves)
    axes.set_xlabel("environment steps")
    figure.savefig(path, dpi=120)
    return path


def draw_returns(axes: Axes, curves: Curves) -> None:
    """Into axes: returns of training, validation and held-out learners, with confidence intervals where they were logged."""
    if "return" in curves:
        axes.plot(*zip(*curves["return"], strict=True), color="#9aa5b1", label="training (last 100 episodes)")
    evaluated = {"val": "validation"}
    held_out = sorted(name for name in curves if name.startswith("held_out/") and name.endswith("/return"))
    evaluated |= {name.removesuffix("/return"): "held out: " + name.split("/")[1] for name in held_out}
    for prefix, label in evaluated.items():
        if f"{prefix}/return" not in curves:
            continue
        steps, means = zip(*curves[f"{prefix}/return"], strict=True)
        [line] = axes.plot(steps, means, marker="o", markersize=3, label=label, linewidth=2 if prefix == "val" else 1.2)
        spread = dict(curves.get(f"{prefix}/return_ci95", ()))
        low, high = ([m + sign * spread.get(s, 0.0) for s, m in zip(steps, means, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if "val/return_worst" in curves:
        axes.plot(*zip(*curves["val/return_worst"], strict=True), ":", color="#555", label="validation: the worst")
    axes.legend(fontsize="small")
    label_curves(axes, "return (bands: 95 % confidence intervals of the mean)")


def label_curves(axes: Axes, title: str) -> None:
    """Title, grid and ticks as all panels of curves have them."""
    axes.set_title(title, fontsize="medium", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 4))
    axes.tick_params(labelsize="small")


def draw_pairs(dataset: DistilledDataset, path: Path) -> Path:
    """The pairs as what they mean in their environment, where that can be drawn, and as heat maps of their numbers.

    Cart-poles: carts and poles in place, and how likely each push is. MuJoCo: the body in its pose, and the action.
    Stacked frames: the frames, and how likely each action is. Poses are drawn in the environment's units, heat maps as
    learners are fed the numbers. Where nothing can be drawn, heat maps alone, with a note saying why.
    """
    scene, note = None, ""
    try:
        scene = _scene(dataset)
    except Exception as error:  # a picture is not worth a run: graphics fail in many ways
        note = f"poses not drawn: {error}"
        logger.warning(note)
    frames = stacked_frames(dataset)
    heat = 0.0 if frames else min(6.0, 1.7 + 0.13 * dataset.pairs)
    above = scene[0] if scene else 0.0
    figure = new_figure(WIDTH, above + heat + 0.5)
    title = f"{dataset.env}: {dataset.pairs} pairs, learning rate {dataset.learning_rate.item():.3g}"
    figure.suptitle(title, parse_math=False)
    if note:
        figure.supxlabel("\n".join(textwrap.wrap(note, 170)), fontsize="small", parse_math=False)
    parts = [part for part in (above, heat) if part]
    halves = iter(figure.subfigures(len(parts), 1, height_ratios=parts, squeeze=False).flat)
    if scene:
        scene[1](next(halves))
    if heat:
        _heat_maps(next(halves), dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def stacked_frames(dataset: DistilledDataset) -> bool:
    """Whether an observation is a few frames, [C, H, W]; a picture with channels last is drawn as numbers."""
    shape = dataset.observation_shape
    return len(shape) == 3 and shape[0] <= FRAMES[0] and not dataset.encoded


def _scene(dataset: DistilledDataset) -> tuple[float, Callable[[SubFigure], None]] | None:
    """Height (inches) of the picture that means something in this environment, and what draws it; None: no such one."""
    shape = dataset.observation_shape
    if dataset.encoded:
        return None
    if stacked_frames(dataset):
        rows = min(dataset.pairs, FRAME_ROWS)
        return 0.5 + 1.55 * rows, partial(_draw_frames, dataset=dataset, rows=rows)
    physical = (dataset.observations * dataset.observation_std + dataset.observation_mean).cpu().numpy()
    if CART_POLE.fullmatch(dataset.env) and shape == (2 * dataset.outputs,):
        shown = min(dataset.pairs, CART_PAIRS)
        dimensions = dataset.outputs // 2
        columns = dimensions if dimensions > 1 else min(shown, 3)
        rows = math.ceil(shown * dimensions / columns)
        height = 0.5 + (rows - 0.16) * WIDTH / columns * CELL_HEIGHT / CELL_WIDTH
        states = physical[:shown].reshape(shown, dimensions, 4)
        return height, partial(_draw_cart_poles, dataset=dataset, states=states, columns=columns)
    if len(shape) == 1 and dataset.action_type == "continuous":
        from .envs.rendering import render_poses

        frames = render_poses(dataset.env, dataset.env_kwargs, physical[:POSES])
        if frames is not None:
            columns = min(10, len(frames))
            height = 0.5 + math.ceil(len(frames) / columns) * WIDTH / columns * (1 + BARS)
            return height, partial(_draw_poses, dataset=dataset, frames=frames, columns=columns)
    return None


def _heat_maps(figure: SubFigure, dataset: DistilledDataset) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    label = "logit of action" if dataset.action_type == "discrete" else "action mean"
    panels = [
        (left, dataset.observations.flatten(1), "observations, as learners are fed them", "entry"),
        (right, dataset.targets, "targets", label),
    ]
    if dataset.encoded:  # of a game, whose frames have their targets beside them
        panels[1] = (right, dataset.targets.softmax(-1), "probability of actions by the targets", "")
    for axes, values, title, label in panels:
        # A few extreme numbers would leave the others without colour.
        limit = max(values.abs().flatten().quantile(0.995, interpolation="higher").item(), 1e-6)
        image = axes.imshow(
            values.cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(label)
        axes.set_ylabel("pair")
        axes.locator_params(integer=True)
        beyond = bool((values.abs() > limit).any())
        figure.colorbar(image, ax=axes, extend="both" if beyond else "neither")
    if dataset.encoded:
        right.set_xticks(range(dataset.outputs), _action_names(dataset), rotation=90, fontsize="x-small")


def _shown(shown: int, dataset: DistilledDataset) -> str:
    return f"pairs 0–{shown - 1} of {dataset.pairs}: " if shown < dataset.pairs else ""


def _draw_cart_poles(figure: SubFigure, dataset: DistilledDataset, states: np.ndarray, columns: int) -> None:
    """``states`` [shown, N, 4], one pair a row (several in a row if N = 1); arrows of likely pushes are long."""
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import Rectangle

    shown, dimensions = states.shape[:2]
    axes = figure.subplots()
    push = dataset.targets[:shown].softmax(-1).view(shown, dimensions, 2).cpu().numpy()
    logits = dataset.targets[:shown].view(shown, dimensions, 2).cpu().numpy()
    rails, poles, carts, speeds = [], [], [], []
    fastest = max(float(np.abs(states[..., 1::2]).max()), 1e-6)
    for index in range(shown * dimensions):
        pair, dimension = divmod(index, dimensions)
        row, column = divmod(index, columns)
        left, floor = column * CELL_WIDTH, -row * CELL_HEIGHT
        x, x_dot, theta, theta_dot = states[pair, dimension]
        rails += [[(left - TRACK, floor), (left + TRACK, floor)]]
        rails += [[(left + end, floor - 0.1), (left + end, floor + 0.15)] for end in (-TRACK, TRACK)]
        cart = left + float(np.clip(x, -TRACK, TRACK))
        angle = float(np.clip(theta, -np.pi / 2, np.pi / 2))
        tip = cart + np.sin(angle), floor + 0.3 + np.cos(angle)
        carts.append(Rectangle((cart - 0.28, floor), 0.56, 0.3))
        poles.append([(cart, floor + 0.3), tip])
        speeds.append((cart, floor + 0.15, x_dot / fastest, 0.0))
        turn = theta_dot / fastest
        speeds.append((*tip, turn * np.cos(angle), -turn * np.sin(angle)))
        for side, likely, logit in zip((-1, 1), push[pair, dimension], logits[pair, dimension], strict=True):
            axes.annotate(
                "",
                (left + side * (0.15 + 1.5 * likely), floor - 0.42),
                (left + side * 0.15, floor - 0.42),
                arrowprops={"arrowstyle": "-|>" if likely > 0.02 else "-", "color": PUSH, "lw": 0.5 + 3 * likely},
            )
            axes.text(left + side * 2.3, floor - 0.42, f"{logit:.1f}", ha="center", va="center", fontsize=7, color=PUSH)
        if dimension == 0:
            axes.text(left - TRACK, floor + 1.25, f"pair {pair}", fontsize=8, va="top")
    axes.add_collection(LineCollection(rails, colors="#666666", linewidths=1))
    axes.add_collection(PatchCollection(carts, facecolor="#303030", zorder=2))
    axes.add_collection(LineCollection(poles, colors="#c98a4b", linewidths=3.5, zorder=3))
    x, y, u, v = np.array(speeds).T
    axes.quiver(
        x, y, u, v, angles="xy", scale_units="xy", scale=1, width=0.0016, color="#d03050", zorder=4, headwidth=5
    )
    axes.set_xlim(-CELL_WIDTH / 2, (columns - 0.5) * CELL_WIDTH)
    axes.set_ylim(1.85 - math.ceil(shown * dimensions / columns) * CELL_HEIGHT, 1.45)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(
        f"{_shown(shown, dataset)}red: velocity of cart and pole tip, the longest {fastest:.2g} m/s; blue: probability of each push "
        "by the targets, and its logit",
        fontsize="medium",
    )


def _draw_poses(figure: SubFigure, dataset: DistilledDataset, frames: np.ndarray, columns: int) -> None:
    """``frames`` [shown, size, size, 3] in rows of ``columns``, each above bars of its action."""
    shown, size = frames.shape[:2]
    rows, tall = math.ceil(shown / columns), round(size * (1 + BARS))
    mosaic = np.full((rows * tall, columns * size, 3), 255, dtype=np.uint8)
    axes = figure.subplots()
    actions = dataset.targets[:shown].cpu().numpy()
    limit = max(float(np.quantile(np.abs(actions), 0.99)), 1e-6)
    width = 0.9 * size / actions.shape[1]
    for pair, frame in enumerate(frames):
        row, column = divmod(pair, columns)
        top, left = row * tall, column * size
        mosaic[top : top + size, left : left + size] = frame
        middle, reach = top + size * (1 + BARS / 2), size * BARS * 0.46
        bars = np.clip(actions[pair] / limit, -1, 1) * reach
        at = left + 0.05 * size + (np.arange(len(bars)) + 0.5) * width
        axes.bar(at, -bars, 0.85 * width, middle, color=np.where(bars > 0, "#b2182b", "#2166ac"))
        axes.plot([left + 0.05 * size, left + 0.95 * size], [middle, middle], color="#888888", lw=0.5)
        axes.text(left + 6, top + 6, str(pair), fontsize=7, va="top", color="#404040")
    axes.imshow(mosaic, interpolation="antialiased")
    axes.set_xlim(0, columns * size)
    axes.set_ylim(rows * tall, 0)
    axes.axis("off")
    axes.set_title(
        f"{_shown(shown, dataset)}poses (velocities are not shown), and the action means from −{limit:.2g} to {limit:.2g}",
        fontsize="medium",
    )


def _draw_frames(figure: SubFigure, dataset: DistilledDataset, rows: int) -> None:
    """A row for each pair: its stacked frames (oldest first), and how likely its targets make each action."""
    channels = dataset.observation_shape[0]
    panels = figure.subplots(rows, channels + 1, width_ratios=[1] * channels + [3], squeeze=False)
    limit = max(dataset.observations.abs().flatten()[:1_000_000].quantile(0.995, interpolation="higher").item(), 1e-6)
    discrete = dataset.action_type == "discrete"
    names = _action_names(dataset)
    likely = dataset.targets[:rows].softmax(-1)
    for pair, row in enumerate(panels):
        for channel, axes in enumerate(row[:-1]):
            frame = dataset.observations[pair, channel].cpu().numpy()
            axes.imshow(frame, cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if pair == 0:
                axes.set_title(f"frame {channel}", fontsize="small")
        row[0].set_ylabel(f"pair {pair}", fontsize="small")
        values = likely[pair] if discrete else dataset.targets[pair]
        row[-1].bar(range(len(values)), values.cpu().numpy(), color=PUSH)
        row[-1].tick_params(labelsize=6)
        row[-1].set_xticks(range(len(values)), names if pair == rows - 1 else [], rotation=90)
        if discrete:
            row[-1].set_ylim(0, min(1.0, 1.1 * likely.max().item()))
        if pair == 0:
            row[-1].set_title("probability of actions by the targets" if discrete else "action", fontsize="small")
    figure.suptitle(f"{_shown(rows, dataset)}observations from −{limit:.2g} to {limit:.2g}", fontsize="medium")


def _action_names(dataset: DistilledDataset) -> list[str]:
    """What an Atari game calls its actions; numbers where it cannot be asked."""
    numbers = [str(index) for index in range(dataset.outputs)]
    if not dataset.env.startswith("ALE/"):
        return numbers
    from .envs import ConfigError, _gymnasium_env

    try:
        # Of what our own simulator can be told this alone changes the actions; Gymnasium's game does not know the rest.
        options = {name: value for name, value in dataset.env_kwargs.items() if name == "full_action_space"}
        made = _gymnasium_env(dataset.env, options)
    except ConfigError:
        return numbers
    names = made.unwrapped.get_action_meanings()
    made.close()
    return names if len(names) == dataset.outputs else numbers
