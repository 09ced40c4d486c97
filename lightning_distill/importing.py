"""Import of the files that the paper's authors released (Wilhelm & Ventura 2025) into format 1.

| file | content |
|---|---|
| discrete actions | ``x`` [n, *obs], ``y`` [n, d] logits, ``inner_lr`` |
| continuous actions | under the key ``distiller``: ``x``, ``y_mean`` [n, d], ``y_logstd`` [1, d], ``inner_lr`` |
| encoder (Atari) | state dict of the first layers of the Nature CNN |

Files are read with ``weights_only``: tensors alone, nothing is executed.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from .dataset import DatasetError, DistilledDataset
from .envs import env_spec, make_env, simulator_threads, stream_seed
from .learners import MLP
from .matching import check_matches, trained_family
from .moments import RunningMoments
from .nature import FRAMES, LEVELS, MAX_PIXEL, NatureCNN, make_encoder
from .teaching import seeded, teach_many

DISCRETE, CONTINUOUS = ("x", "y", "inner_lr"), ("x", "y_mean", "y_logstd", "inner_lr")
#: Fresh learners whose observations an estimated normaliser is made of.
LEARNERS = 16


def import_released(
    path: str | os.PathLike[str], env: str, encoder: str | os.PathLike[str] | None = None
) -> DistilledDataset:
    """A dataset released by the paper's authors, as it is: with the normaliser that changes nothing (frames: / 255).

    Args:
        path: its file.
        env: Gymnasium id of its environment; files do not say it. MuJoCo's are of version v4.
        encoder: the file of its encoder (Atari, level 1 or more).

    Raises:
        DatasetError: the file is not what is described above; the message says what is wrong with it.
        ConfigError: the dataset is not one for this environment.
    """
    content = _read(path)
    content = content.get("distiller", content) if len(content) == 1 else content
    keys = next(
        (keys for keys in (DISCRETE, CONTINUOUS) if isinstance(content, dict) and set(content) == {*keys}), None
    )
    if keys is None:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DatasetError(
            f"{path}: holds {found[:200]}; expected {', '.join(DISCRETE)}, or {', '.join(CONTINUOUS)} under 'distiller'"
        )
    tensors = {key: _floats(path, key, content[key]) for key in keys}
    shape = tensors["x"].shape[1:]
    rate, targets = tensors["inner_lr"], tensors["y" if keys == DISCRETE else "y_mean"]
    log_std = None if keys == DISCRETE else _taught_log_std(path, tensors["y_logstd"], rate, targets)
    layers = {} if encoder is None else _encoder(encoder, shape)
    try:
        dataset = DistilledDataset(
            observations=tensors["x"],
            targets=targets,
            learning_rate=rate.reshape(()) if rate.numel() == 1 else rate,
            observation_mean=torch.zeros(shape),
            observation_std=torch.full(shape, MAX_PIXEL if shape == FRAMES else 1.0),
            log_std=log_std,
            encoder=layers,
            env=env,
            action_type="discrete" if keys == DISCRETE else "continuous",
            metadata={
                "encoder_level": str(len(layers) // 2),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            | {"learners": [(NatureCNN() if shape == FRAMES else MLP()).describe()]},
        )
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    check_matches(dataset, env_spec(env))
    return dataset


def estimate_normaliser(dataset: DistilledDataset, steps: int, seed: int = 0) -> tuple[DistilledDataset, int]:
    """The dataset with the mean and standard deviation of what taught learners observe.

    Sixteen fresh learners play, with sampled actions, under the statistics of all that they have observed so far,
    as in training with running normalisation; what these are in the end is kept.

    It is a guess, and returns depend on it: who runs fast widens the statistics of velocities, under which learners run
    faster. Released Ant pairs scored from 630 to 3160 over eight seeds. State several seeds, not one.

    Args:
        dataset: one that was distilled with a normaliser which its file does not hold.
        steps: environment steps, over all learners.
        seed: of learners, start states and actions.

    Returns:
        the dataset, and the number of steps taken: a multiple of the number of learners.
    """
    spec = env_spec(dataset.env, dataset.env_kwargs)
    check_matches(dataset, spec)
    moments, taken = RunningMoments(spec.observation_shape), 0
    env = make_env(spec, LEARNERS, stream_seed(seed, 4))
    try:
        with seeded(stream_seed(seed, 5)), torch.no_grad(), simulator_threads(env):
            policy = teach_many(trained_family(dataset), dataset, LEARNERS)
            state = env.reset()
            while taken < steps:
                moments.update(state["observation"])
                policy.observation_mean.copy_(moments.mean)
                policy.observation_std.copy_(moments.std)
                state["action"] = policy(state["observation"], sample=True)
                _, state = env.step_and_maybe_reset(state)
                taken += LEARNERS
    finally:
        env.close()
    mean, std = policy.observation_mean.clone(), policy.observation_std.clone()
    return dataclasses.replace(dataset, observation_mean=mean, observation_std=std), taken


def _read(path: str | os.PathLike[str]) -> dict[Any, Any]:
    if not os.path.isfile(path):
        raise DatasetError(f"{path}: no such file")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # which errors a broken or hostile file provokes is the library's business
        raise DatasetError(f"{path}: not a file of tensors alone that torch can load; nothing in it was run") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: holds a {type(content).__name__}, expected named tensors")
    return content


def _floats(path: Any, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DatasetError(f"{path}: {key}: {kind}, expected a dense tensor of floating-point numbers")
    return value.detach().float().contiguous()


def _taught_log_std(path: Any, target: Tensor, rate: Tensor, targets: Tensor) -> Tensor:
    """The authors' learners have a log-std of their own: 0 at first, then one step on its mean squared error."""
    outputs = targets.shape[-1] if targets.dim() else 0
    if target.numel() != outputs or rate.numel() != 1:
        raise DatasetError(
            f"{path}: y_logstd: shape {list(target.shape)} with inner_lr {list(rate.shape)}, expected [1, {outputs}], []"
        )
    return 2 * rate.reshape(()) / outputs * target.reshape(-1)


def _encoder(path: str | os.PathLike[str], shape: torch.Size) -> dict[str, Tensor]:
    content = _read(path)
    if shape != FRAMES:
        raise DatasetError(f"{path}: an encoder, but the dataset's observations are {list(shape)}, not {list(FRAMES)}")
    with torch.device("meta"):  # shapes alone: nothing is drawn at random
        expected = make_encoder(min(max(1, len(content) // 2), LEVELS)).state_dict()
    if set(content) != set(expected):
        raise DatasetError(
            f"{path}: holds {', '.join(map(str, content))[:200]}; expected the first layers of the Nature CNN: {', '.join(expected)}"
        )
    tensors = {name: _floats(path, name, value) for name, value in content.items()}
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise DatasetError(f"{path}: {name}: shape {list(value.shape)}, expected {list(expected[name].shape)}")
    return tensors
