"""The commands beside training: ``evaluate``, ``show``, ``watch``, ``list``, ``import``, ``search``, ``pipeline``.

Each is a function: its signature gives the options, its docstring the help. With ``--json`` it writes JSON alone on
standard output. Bad input ends with exit code 2 and one line on standard error.
"""

from __future__ import annotations

import inspect
import math
import os
import shlex
import sys
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from . import dataset as datasets
from .configs import with_shipped_config
from .dataset import DistilledDataset, load
from .envs import Backend, ConfigError
from .messages import in_a_line

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from .learners import LearnerFamily

#: What `show` writes of a table: rows, and numbers in a cell.
SHOWN_PAIRS, SHOWN_NUMBERS = 16, 8


def evaluate(
    dataset: str,
    env: str | None = None,
    family: list[str] | None = None,
    learners: int = 100,
    episodes: int = 1,
    greedy: bool = False,
    held_out: bool = False,
    step_rule: str | None = None,
    controls: bool = False,
    seed: int = 1,
    gravity: float = 1.0,
    mass: float = 1.0,
    friction: float = 1.0,
    sticky_actions: float = 0.0,
    backend: Backend = "auto",
    json: bool = False,
) -> None:
    """Fresh learners are drawn, taught by one step on a dataset, and play whole episodes.

    Args:
        dataset: name in the zoo, or path of a file.
        env: another environment id than the dataset's own, as it is made by default; its shapes must agree.
        family: what learners are drawn from: paper, width_256, relu, … or class paths; default: what the dataset was
            distilled with, which is also called in-distribution.
        learners: fresh learners of each family.
        episodes: whole episodes of each learner.
        greedy: largest logit or mean action, instead of sampled actions.
        held_out: also every family of the default list of held-out ones; those the dataset was distilled with are marked.
        step_rule: sgd, line_search, newton or projection; default: the one the dataset recommends, and sgd.
        controls: also learners that were not taught, learners taught on shuffled targets, and random actions.
        seed: of learners, start states and actions; the default's returns are those that files state.
        gravity: factor on gravity (MuJoCo).
        mass: factor on the masses of all bodies (MuJoCo).
        friction: factor on friction (MuJoCo).
        sticky_actions: probability that a step repeats the action before it.
        backend: who simulates: auto, gymnasium, processes or envpool.
        json: write JSON.
    """
    from .envs.variations import Variation
    from .evaluation import evaluate_all
    from .families import families_apart, held_out_from
    from .matching import own_family
    from .returns import IN_DISTRIBUTION, as_returns
    from .tables import returns_table, shares

    pairs = load(dataset)
    kind = "greedy" if greedy else "sampled"
    variation = Variation(gravity=gravity, mass=mass, friction=friction, sticky_actions=sticky_actions)
    families = {name: _family(name, pairs) for name in family or [IN_DISTRIBUTION]}
    if held_out:
        strangers = {
            name: _family(name, pairs) for name in held_out_from(pairs.observation_shape) if name not in families
        }
        families |= families_apart(strangers, own_family(pairs, families))
    evaluations = evaluate_all(
        pairs,
        families,
        controls=controls,
        kinds=(kind,),
        step_rules=None if step_rule is None else [step_rule],
        env=env,
        learners=learners,
        episodes=episodes,
        seed=seed,
        variation=variation,
        backend=backend,
    )
    name = env or pairs.env
    if json:
        returns = as_returns(evaluations)
        for row, share in shares(evaluations, kind).items():
            returns[row][kind]["share"] = share
        _print_json(
            {"dataset": dataset, "env": name, "pairs": pairs.pairs, "seed": seed, "variation": str(variation)}
            | {"returns": returns}
        )
        return
    changed = f", varied: {variation}" if variation else ""
    _console().print(returns_table(f"{dataset}: {pairs.pairs} pairs, {name}{changed}", evaluations))


def show(dataset: str, output: str | None = None, json: bool = False) -> None:
    """What a dataset is: where it comes from, its pairs as a table and as a picture.

    Args:
        dataset: name in the zoo, or path of a file.
        output: picture of the pairs to write (.png, .pdf or .svg).
        json: write JSON, all pairs in it.
    """
    pairs = load(dataset)
    if output is not None:
        suffix = Path(output).suffix.lower()
        if suffix not in (".png", ".pdf", ".svg"):
            raise ConfigError(f"output={output!r}: allowed are names that end in .png, .pdf or .svg")
        from .pictures import draw_pairs

        draw_pairs(pairs, Path(output))
    if json:
        _print_json(
            _described(pairs)
            | {"metadata": dict(pairs.metadata)}
            | {"observations": pairs.observations.tolist(), "targets": pairs.targets.tolist()}
        )
        return
    console = _console()
    console.print(repr(pairs), highlight=False, markup=False, soft_wrap=True)
    console.print(_pairs_table(pairs))
    if output is not None:
        console.print(f"picture: {output}", highlight=False, markup=False, soft_wrap=True)


def watch(
    dataset: str,
    output: str | None = None,
    env: str | None = None,
    family: str | None = None,
    seed: int = 1,
    greedy: bool = False,
    steps: int = 1000,
    json: bool = False,
) -> None:
    """One fresh learner, taught on a dataset, at play: in a window, or as a video, which needs no display.

    Args:
        dataset: name in the zoo, or path of a file.
        output: video to write, .mp4 (needs imageio-ffmpeg) or .gif; default: a window (needs pygame).
        env: another environment id than the dataset's own, as it is made by default; its shapes must agree.
        family: what the learner is drawn from, as in evaluate.
        seed: of the learner, the start state and the actions.
        greedy: largest logit or mean action, instead of sampled actions.
        steps: environment steps at most; the episode may end before.
        json: write JSON.
    """
    from .watching import record

    pairs = load(dataset)
    drawn_from = None if family is None else _family(family, pairs)
    path = None if output is None else Path(output)
    made = record(pairs, path, env=env, family=drawn_from, seed=seed, greedy=greedy, steps=steps)
    if json:
        shown = None if made.path is None else str(made.path)
        _print_json({"path": shown, "env": env or pairs.env, "steps": made.steps, "return": made.total})
    else:
        print(f"{made.path or 'window'}: {made.steps} steps of {env or pairs.env}, return {made.total:.1f}")


def list_zoo(json: bool = False) -> None:
    """The datasets that come with this package.

    Args:
        json: write JSON.
    """
    shipped = {name: (path, load(path)) for name, path in datasets.zoo().items()}
    if json:
        _print_json(
            [
                {"name": name, "file_bytes": path.stat().st_size} | _described(pairs)
                for name, (path, pairs) in shipped.items()
            ]
        )
        return
    if not shipped:
        print("no datasets come with this package")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for title in ("name", "environment", "n", "step rule", "file, bytes", "return, sampled", "greedy"):
        table.add_column(title, justify="left" if title in ("name", "environment", "step rule") else "right")
    for name, (path, pairs) in shipped.items():
        first = next(iter((pairs.metadata.get("returns") or {}).values()), {})
        cells = [_with_interval(first[kind]) if kind in first else "" for kind in ("sampled", "greedy")]
        size = f"{path.stat().st_size:,}"
        table.add_row(name, escape(pairs.env), str(pairs.pairs), pairs.step_rule, size, *cells)
    console = _console()
    console.print(table)
    for name, (_, pairs) in shipped.items():
        if "command" in pairs.metadata:
            line = f"{name}: {pairs.metadata['command']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def import_file(
    file: str,
    *,
    env: str,
    output: str,
    encoder: str | None = None,
    normaliser_steps: int = 0,
    seed: int = 0,
    evaluate: int = 0,
    json: bool = False,
) -> None:
    """A file released by the paper's authors (cart-pole, MuJoCo or Atari) becomes a dataset of format 1.

    Args:
        file: theirs, .pt or .ckpt; tensors alone are read, nothing in it is run.
        env: its environment, as a Gymnasium id; MuJoCo's are of version v4.
        output: dataset to write.
        encoder: their file of the encoder (Atari, level 1 or more).
        normaliser_steps: estimate the observation normaliser, which their MuJoCo files lack, from so many environment
            steps of taught learners; 0: observations are fed as they are.
        seed: of that estimate; returns can differ much between seeds, so look at several.
        evaluate: fresh learners to evaluate it with; their returns are written into the dataset.
        json: write JSON.
    """
    from .evaluation import evaluate_all
    from .importing import estimate_normaliser, import_released
    from .returns import as_returns

    if normaliser_steps < 0 or evaluate < 0:
        raise ConfigError(f"normaliser_steps={normaliser_steps}, evaluate={evaluate}: allowed are integers ≥ 0")
    pairs = import_released(file, env, encoder)
    if normaliser_steps and pairs.action_type == "discrete":
        raise ConfigError(
            f"normaliser_steps={normaliser_steps}: their pairs for cart-pole and games are of observations as they are; allowed is 0"
        )
    command = ["lightning-distill", "import", Path(file).name, "--env", env, "-o", Path(output).name]
    command += ["--encoder", Path(encoder).name] if encoder else []
    taken = 0
    if normaliser_steps:
        pairs, taken = estimate_normaliser(pairs, normaliser_steps, seed)
        command += ["--normaliser_steps", str(normaliser_steps), "--seed", str(seed)]
    command += ["--evaluate", str(evaluate)] if evaluate else []
    pairs = pairs.with_metadata(command=shlex.join(command))
    path = pairs.save(output)  # a place that cannot be written to is better known before the evaluation
    if evaluate:
        evaluations = evaluate_all(pairs, controls=False, learners=evaluate)
        pairs = pairs.with_metadata(returns=as_returns(evaluations))
        pairs.save(output)
    if json:
        _print_json({"path": str(path), "normaliser_steps": taken} | _described(pairs))
        return
    console = _console()
    console.print(repr(pairs), highlight=False, markup=False, soft_wrap=True)
    if taken:
        print(f"normaliser estimated from {taken} environment steps")
    if len(pairs.observation_shape) == 3 and encoder is None:
        print("of encoder level 0: pairs of a higher level teach nothing without their encoder (--encoder)")
    print(f"written: {path}")


def search(
    config: str,
    *,
    pairs: list[int],
    level: float | None = None,
    share: float = 0.9,
    option: list[str] | None = None,
    output: str | None = None,
    json: bool = False,
) -> None:
    """The smallest dataset: runs a config with more and more pairs until fresh learners reach a level.

    Args:
        config: of the experiment, as `lightning fit --config` takes it.
        pairs: numbers of pairs to try; each is a run of its own.
        level: mean return (sampled actions) that suffices; default: a share of the return with the most pairs, which is
            then run first.
        share: that share.
        option: more options of `lightning fit`, without their dashes: seed_everything=2 data.env_steps=500000.
        output: folder of the runs; default: runs/search/ and the file's name.
        json: write JSON.
    """
    from rich.table import Table

    from .search import smallest

    folder = Path(output or Path("runs", "search", Path(config).stem))
    found, trials, level = smallest(with_shipped_config(config), pairs, level, share, folder, _with_dashes(option))
    if json:
        rows = [{"pairs": trial.pairs, "path": str(trial.path)} | trial.entry for trial in trials]
        _print_json({"smallest": found and found.pairs, "level": level, "runs": rows})
        return
    table = Table("pairs", "return ± 95 % CI, sampled", "worst", "dataset", title=f"{config}: level {level:.1f}")
    for trial in trials:
        marked = f"{trial.pairs}" + (" (smallest)" if trial is found else "")
        table.add_row(marked, _with_interval(trial.entry), f"{trial.entry['worst']:.1f}", str(trial.path))
    _console().print(table)
    if found is None:
        print(f"none of {', '.join(str(trial.pairs) for trial in trials)} pairs reaches {level:.1f}")


def pipeline(config: str, option: list[str] | None = None, output: str | None = None, json: bool = False) -> None:
    """Runs one after another, each of which may begin with what an earlier one wrote; goes on where it stopped.

    Args:
        config: YAML file of stages, as in conf/pipelines.
        option: more options of `lightning fit`, without their dashes, for every stage: seed_everything=2.
        output: folder of the runs; default: runs/pipelines/ and the file's name.
        json: write JSON; what the runs print then goes to standard error.
    """
    from .pipeline import run_pipeline

    folder = Path(output or Path("runs", "pipelines", Path(config).stem))
    runs = run_pipeline(with_shipped_config(config), folder, _with_dashes(option), sys.stderr if json else None)
    if json:
        _print_json({name: str(run) for name, run in runs.items()})
        return
    for name, run in runs.items():
        print(f"{name}: {run}")


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate,
    "show": show,
    "watch": watch,
    "list": list_zoo,
    "import": import_file,
    "search": search,
    "pipeline": pipeline,
}
SHORT = {"output": "-o"}


def run(name: str, args: list[str]) -> None:
    """Carry out one of ``COMMANDS``; exits with code 2 after one line on standard error if the input is bad."""
    from jsonargparse import ArgumentError

    try:
        COMMANDS[name](**_parser(name).parse_args(args).as_dict())
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ArgumentError, ValueError, OSError) as error:
        print("error:", in_a_line(str(error)).removeprefix("data."), file=sys.stderr)
        sys.exit(2)


def summary(name: str) -> str:
    """The first line of a command's help."""
    return (COMMANDS[name].__doc__ or "").splitlines()[0]


def _parser(name: str) -> Any:
    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    command = COMMANDS[name]
    helps = {parameter.arg_name: parameter.description for parameter in parse(command.__doc__ or "").params}
    prog = f"{Path(sys.argv[0]).name} {name}"
    parser = ArgumentParser(prog=prog, description=summary(name), exit_on_error=False, allow_abbrev=False)
    hints = get_type_hints(command)
    for key, parameter in inspect.signature(command).parameters.items():
        options: dict[str, Any] = {"help": helps[key]}
        flags = [SHORT[key], f"--{key}"] if key in SHORT else [f"--{key}"]
        required = parameter.default is parameter.empty
        if required and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            flags = [key]
        elif required:
            options["required"] = True
        else:
            options["default"] = parameter.default
        if hints[key] is bool:
            options["action"] = "store_true"
        elif hints[key] in (list[str] | None, list[int]):
            kind = int if hints[key] == list[int] else str
            metavar = "NUMBER" if kind is int else "NAME"
            # Given twice, both count: of two ``--option`` the first would be lost without a word.
            options |= {"type": kind, "nargs": "+", "action": "extend", "metavar": metavar}
        else:
            options["type"] = hints[key]
        parser.add_argument(*flags, **options)
    return parser


def _with_dashes(option: list[str] | None) -> list[str]:
    """Options of `lightning fit` as that takes them."""
    return [f"--{entry.removeprefix('--')}" for entry in option or []]


def _family(name: str, pairs: DistilledDataset) -> LearnerFamily:
    """The family of a name, tried on the dataset's shapes, so that one that does not fit is named at once."""
    from .families import family_named
    from .matching import trained_family
    from .returns import IN_DISTRIBUTION

    found = trained_family(pairs) if name == IN_DISTRIBUTION else family_named(name)
    try:
        found.draw(1, pairs.learner_shape, pairs.outputs)
    except Exception as error:  # somebody else's module may raise anything
        raise ConfigError(
            f"family={name!r}: cannot be made for observations {list(pairs.learner_shape)} and {pairs.outputs} "
            f"outputs ({error})"
        ) from error
    return found


def _described(pairs: DistilledDataset) -> dict[str, Any]:
    return {
        "env": pairs.env,
        "pairs": pairs.pairs,
        "observation_shape": list(pairs.observation_shape),
        "outputs": pairs.outputs,
        "action_type": pairs.action_type,
        "learning_rate": pairs.learning_rate.item(),
        "bytes": pairs.nbytes,
        "returns": pairs.metadata.get("returns") or {},
        "command": pairs.metadata.get("command"),
    }


def _pairs_table(pairs: DistilledDataset) -> Any:
    from rich.table import Table

    kind = "logits" if pairs.action_type == "discrete" else "action means"
    left = pairs.pairs - SHOWN_PAIRS
    table = Table("pair", "observation, as learners are fed it", f"target ({kind})")
    table.caption = f"and {left} more pairs" if left > 0 else None
    for index, (observation, target) in enumerate(zip(pairs.observations, pairs.targets, strict=True)):
        if index == SHOWN_PAIRS:
            break
        table.add_row(str(index), _numbers(observation), _numbers(target))
    return table


def _numbers(values: Tensor) -> str:
    if values.dim() > 1:
        shape = "×".join(map(str, values.shape))
        return f"{shape} numbers, mean {values.mean():.2f}, std {values.std():.2f}"
    shown = " ".join(f"{value:6.2f}" for value in values[:SHOWN_NUMBERS].tolist())
    return shown + (f" … {len(values) - SHOWN_NUMBERS} more" if len(values) > SHOWN_NUMBERS else "")


def _with_interval(entry: dict[str, Any]) -> str:
    return f"{entry['mean']:.1f}" + ("" if entry.get("ci95") is None else f" ± {entry['ci95']:.1f}")


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # Into a file or a pipe, lines are as long as they are.
    return console if console.is_terminal else Console(width=200)


def _print_json(value: Any) -> None:
    print(dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON knows no infinity: the interval of a single learner is null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
