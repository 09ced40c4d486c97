"""Search for the smallest dataset: the same experiment with more and more pairs, until they suffice."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .configs import option_name
from .dataset import DistilledDataset, load
from .envs import ConfigError
from .pipeline import config_of, finished_run
from .returns import IN_DISTRIBUTION


@dataclass(frozen=True)
class Trial:
    """One run: its number of pairs, its dataset, and the returns of fresh learners (sampled actions) in its test."""

    pairs: int
    path: Path
    dataset: DistilledDataset

    @property
    def entry(self) -> dict[str, Any]:
        return self.dataset.metadata["returns"][IN_DISTRIBUTION]["sampled"]


def smallest(
    config: str, pairs: Sequence[int], level: float | None, share: float, folder: Path, options: Sequence[str] = ()
) -> tuple[Trial | None, list[Trial], float]:
    """The least of ``pairs`` whose fresh learners reach a level in their mean return.

    Args:
        config: of the experiment, as ``lightning fit --config`` takes it.
        pairs: numbers of pairs to try, each a run of its own from the same seed.
        level: mean return that suffices; None: ``share`` times that with the largest number of pairs, which is then
            run first.
        share: see there.
        folder: where runs go; those with N pairs below ``pairs_N``, with their log ``fit.log``. A run that finished with the same config
            is not run again, and one that was stopped goes on.
        options: more options of ``lightning fit``, such as ``--seed_everything=2``.

    Returns:
        the trial that suffices, if any; all trials, by number of pairs; the level.

    Raises:
        ConfigError: an argument is out of range, or a run failed: the message ends with its last line.
    """
    numbers = sorted(set(pairs))
    if not numbers or numbers[0] < 1:
        raise ConfigError(f"pairs={list(pairs)}: allowed are one or more integers ≥ 1")
    if not 0 < share <= 1:
        raise ConfigError(f"share={share}: allowed are numbers above 0, up to 1")
    if not Path(config).is_file():
        raise ConfigError(f"config={config!r}: no such file")
    arguments = [f"--config={config}", *options, f"--model.pairs={numbers[0]}"]
    if "model.pairs" in map(option_name, options):
        raise ConfigError("option model.pairs: allowed is --pairs, the numbers that are tried")
    if yaml.safe_load(config_of(arguments))["trainer"].get("limit_test_batches") == 0:
        raise ConfigError("trainer.limit_test_batches=0: allowed is to leave it out; what suffices is told by the test")
    trials: dict[int, Trial] = {}

    def run(number: int) -> Trial:
        if number not in trials:
            trials[number] = _fit(config, number, folder / f"pairs_{number}", options)
        return trials[number]

    if level is None:
        largest = run(numbers[-1])
        most = largest.entry["mean"]
        if most <= 0:
            raise ConfigError(
                f"share={share} of a return of {most:.1f}, that of {largest.path}, says nothing; give a level (--level={most:.0f}): "
                "that run is not run again"
            )
        level = share * most
    found = next((number for number in numbers if run(number).entry["mean"] >= level), None)
    return None if found is None else trials[found], [trials[number] for number in sorted(trials)], level


def _fit(config: str, pairs: int, folder: Path, options: Sequence[str]) -> Trial:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "fit.log"
    before = log.stat().st_size if log.is_file() else 0
    try:
        with log.open("a") as file:
            arguments = [f"--config={config}", *options, f"--model.pairs={pairs}"]
            run = finished_run(folder.name, arguments, folder, file, subprocess.STDOUT)
    except ConfigError as error:
        lines = log.read_bytes()[before:].decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), None)
        # A run that said nothing did not begin.
        why = f": {error}" if said is None else f", see {log}: {said} ({error})"
        raise ConfigError(f"the run with {pairs} pairs failed{why}") from None
    path = run / "distilled.safetensors"
    dataset = load(path)
    if IN_DISTRIBUTION not in dataset.metadata.get("returns", {}):
        raise ConfigError(f"the run with {pairs} pairs was not tested, see {log}")
    return Trial(pairs, path, dataset)
