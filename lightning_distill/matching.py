"""What a dataset is for: the environment in which its learners play, the family that it was distilled with, who can be taught by it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .dataset import DistilledDataset
from .envs import ConfigError, EnvSpec, env_spec, reason
from .families import family_from
from .learners import LearnerFamily
from .mixtures import members
from .nature import FRAMES
from .step_rules import check_outputs
from .teaching import chosen_rule, keep_random_state, teach_many

logger = logging.getLogger(__name__)


def check_matches(dataset: DistilledDataset, spec: EnvSpec) -> None:
    """Raise ``ConfigError`` unless the dataset's shapes and kind of action are the environment's."""
    mine = (dataset.observation_shape, dataset.action_type, dataset.outputs)
    its = spec.interface
    if mine != its:
        raise ConfigError(
            f"the dataset (for {dataset.env}) has observations {mine[0]}, {mine[1]} actions, {mine[2]} outputs; "
            f"env={spec.id!r} needs {its[0]}, {its[1]}, {its[2]}"
        )


def check_begins(option: str, dataset: DistilledDataset, spec: EnvSpec) -> None:
    """``check_matches`` for what a run begins with, and a warning where that is of another environment of the same shapes."""
    check_matches(dataset, spec)
    if dataset.env != spec.id:
        logger.warning("%s: distilled from %s, but data.env=%r", option, dataset.env, spec.id)


def check_taught(name: str, family: LearnerFamily, dataset: DistilledDataset, rules: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless two learners of a family can be taught on two pairs by each rule, and then act on one observation each.

    Before anybody plays or trains. Random state stays as it is.
    """
    few = dataclasses.replace(dataset, observations=dataset.observations[:2], targets=dataset.targets[:2])
    device = few.observations.device
    for rule, member in itertools.product(rules, members(family)):
        chosen_rule(dataset, rule)  # whose absence is no fault of the family
        with keep_random_state(device):
            try:
                taught = teach_many(member, few, 2, rule, device=device)
            except Exception as error:  # somebody else's module may raise anything
                raise ConfigError(f"{name} cannot be taught by {rule} ({reason(error)})") from error
            try:
                observation = torch.zeros(2, 1, *dataset.observation_mean.shape, device=device)
                check_outputs(taught.output(observation), (2, 1, dataset.outputs))
            except Exception as error:
                raise ConfigError(f"{name} cannot act on one observation ({reason(error)})") from error


def played_in(dataset: DistilledDataset, env: str | None = None, env_kwargs: dict[str, Any] | None = None) -> EnvSpec:
    """The environment in which a dataset's learners play: its own, or another, of which the dataset's arguments say nothing."""
    if env_kwargs is None:
        env_kwargs = dataset.env_kwargs if env in (None, dataset.env) else {}
    return env_spec(env or dataset.env, env_kwargs)


def trained_family(dataset: DistilledDataset) -> LearnerFamily:
    """The (first) family that the dataset was distilled with; the paper's where the dataset does not say.

    Raises:
        ConfigError: it was none of this package. A file cannot name code that is then run, so that family has to be given.
    """
    paper = "NatureCNN" if dataset.observation_shape == FRAMES else "MLP"
    described = dataset.metadata.get("learners") or [{"class_path": f"lightning_distill.{paper}"}]
    try:
        return family_from(described[0])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"family: the dataset's own cannot be built ({error}); give one") from None


def own_family(dataset: DistilledDataset, given: Mapping[str, LearnerFamily]) -> LearnerFamily:
    """What the dataset was distilled with; where that cannot be built here, the first of those that are given."""
    try:
        return trained_family(dataset)
    except ConfigError:
        return next(iter(given.values()))
