"""DistilledDataset: the exported artefact, its file (format 1, see README) and the zoo.

Needs torch and safetensors alone; nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

FORMAT = "1"
JSON_KEYS = ("env_kwargs", "learners", "returns", "versions")
TEXT_KEYS = ("step_rule", "encoder_level", "env_steps", "seed", "config", "created", "license")


class DatasetError(ValueError):
    """A file that is no distilled dataset of a known format: the message says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """n synthetic (observation, target) pairs and all that a stranger needs to teach from them and act.

    Attributes:
        observations: [n, *obs], already normalised: learners are fed them as they are.
        targets: [n, d], logits (discrete) or action means in the environment's units (continuous).
        learning_rate: scalar η of the one SGD step.
        log_std: [d], log standard deviation of the taught policy (continuous only).
        observation_mean, observation_std: [*obs]; an environment's observation s is fed to the policy as
            clip((s − mean) / std, ±observation_clip).
        env: Gymnasium id; env_kwargs: arguments it was made with.
        metadata: everything else the file says (section "file format" of the README).
    """

    observations: Tensor
    targets: Tensor
    learning_rate: Tensor
    observation_mean: Tensor
    observation_std: Tensor
    env: str
    action_type: Literal["discrete", "continuous"]
    log_std: Tensor | None = None
    observation_clip: float = 10.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check()

    def _tensors(self) -> dict[str, Tensor]:
        names = ("observations", "targets", "learning_rate", "log_std", "observation_mean", "observation_std")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _check(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise DatasetError(message)

        require(
            self.observations.dim() >= 2, f"observations: shape {tuple(self.observations.shape)}, expected [n, *obs]"
        )
        require(self.targets.dim() == 2, f"targets: shape {tuple(self.targets.shape)}, expected [n, d]")
        n, d = self.targets.shape
        obs = tuple(self.observations.shape[1:])
        require(n >= 1 and d >= 1, f"targets: shape {(n, d)}, expected at least one pair and one output")
        require(len(self.observations) == n, f"observations: {len(self.observations)} rows, but targets has {n}")
        require(
            self.action_type in ("discrete", "continuous"),
            f"action_type={self.action_type!r}: allowed are 'discrete', 'continuous'",
        )
        continuous = self.action_type == "continuous"
        require(continuous == (self.log_std is not None), "log_std: needed for continuous actions, and only for them")
        expected = {"learning_rate": (), "log_std": (d,), "observation_mean": obs, "observation_std": obs}
        for name, value in self._tensors().items():
            require(value.dtype == torch.float32, f"{name}: dtype {value.dtype}, expected torch.float32")
            shape = expected.get(name, tuple(value.shape))
            require(tuple(value.shape) == shape, f"{name}: shape {tuple(value.shape)}, expected {shape}")
            require(bool(value.isfinite().all()), f"{name}: holds NaN or infinity")
        require(bool(self.learning_rate > 0), f"learning_rate={self.learning_rate.item()}: must be positive")
        require(bool((self.observation_std > 0).all()), "observation_std: must be positive")
        require(
            math.isfinite(self.observation_clip) and self.observation_clip > 0,
            f"observation_clip={self.observation_clip}: must be positive",
        )
        require(bool(self.env), "env: empty, expected a Gymnasium id")

    @property
    def pairs(self) -> int:
        """n, the number of pairs."""
        return len(self.targets)

    @property
    def observation_shape(self) -> tuple[int, ...]:
        return tuple(self.observations.shape[1:])

    @property
    def outputs(self) -> int:
        """d: number of actions (discrete) or length of the action vector (continuous)."""
        return self.targets.shape[1]

    @property
    def env_kwargs(self) -> dict[str, Any]:
        return dict(self.metadata.get("env_kwargs", {}))

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(value.nbytes for value in self._tensors().values())

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.observations[index], self.targets[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.observations, self.targets, strict=True)

    def as_torch(self) -> TensorDataset:
        """The pairs as a torch ``Dataset``, for a ``DataLoader`` and a training loop of one's own."""
        return TensorDataset(self.observations, self.targets)

    def normalise(self, observations: Tensor) -> Tensor:
        """An environment's observations as the policy is fed them."""
        scaled = (observations - self.observation_mean) / self.observation_std
        return scaled.clamp(-self.observation_clip, self.observation_clip)

    def to(self, device: torch.device | str) -> DistilledDataset:
        return dataclasses.replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def with_metadata(self, **entries: Any) -> DistilledDataset:
        """The same dataset with entries of its metadata added or replaced."""
        return dataclasses.replace(self, metadata={**self.metadata, **entries})

    def __repr__(self) -> str:
        lines = [
            f"DistilledDataset: {self.pairs} pairs for {self.env}, {self.nbytes:,} bytes",
            f"  observations {list(self.observations.shape)}  targets {list(self.targets.shape)} ({self.action_type})"
            f"  learning rate {self.learning_rate.item():.4g}",
        ]
        for family, kinds in self.metadata.get("returns", {}).items():
            for kind, entry in kinds.items():
                lines.append(
                    f"  return {entry['mean']:.1f} ± {entry['ci95']:.1f} ({family}, {kind}, "
                    f"{entry['learners']} fresh learners × {entry['episodes']} episodes)"
                )
        for key in ("env_steps", "seed", "created", "license"):
            if key in self.metadata:
                lines.append(f"  {key}: {self.metadata[key]}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write format 1, atomically: a reader finds the old file or the whole new one."""
        from safetensors.torch import save

        entries = {
            "format": FORMAT,
            "env": self.env,
            "action_type": self.action_type,
            "loss": "mse",
            "steps": "1",
            "observation_clip": repr(self.observation_clip),
            "step_rule": "sgd",
            "encoder_level": "0",
        }
        for key, value in self.metadata.items():
            entries[key] = json.dumps(value) if key in JSON_KEYS else str(value)
        content = save({name: value.detach().cpu().contiguous() for name, value in self._tensors().items()}, entries)
        return write_atomically(path, content)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Replace ``path`` by ``content`` in one step, so that a crash or a full disk leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def zoo() -> dict[str, Path]:
    """Name → file of the datasets that come with the package."""
    folder = Path(str(files("lightning_distill") / "zoo"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(name_or_path: str | os.PathLike[str]) -> DistilledDataset:
    """A distilled dataset from the zoo (``load("ant")``) or from a file.

    Raises:
        DatasetError: the file is missing, broken, of an unknown format, or its content is not what format 1 says.
    """
    from safetensors import SafetensorError, safe_open

    shipped = zoo()
    path = shipped.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise DatasetError(f"{name_or_path}: no such file, and not in the zoo ({', '.join(shipped) or 'empty'})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from None
    try:
        return _from_file(tensors, metadata)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None


def _from_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> DistilledDataset:
    if metadata.get("format") != FORMAT:
        raise DatasetError(f"format={metadata.get('format')!r}: this version reads {FORMAT!r}")
    for key, allowed in (("loss", "mse"), ("steps", "1")):
        if metadata.get(key) != allowed:
            raise DatasetError(f"{key}={metadata.get(key)!r}: format {FORMAT} allows {allowed!r}")
    required = {"observations", "targets", "learning_rate", "observation_mean", "observation_std"}
    missing = sorted(required - tensors.keys())
    if missing:
        raise DatasetError(f"tensors missing: {', '.join(missing)}")
    unknown = sorted(tensors.keys() - required - {"log_std"})
    if unknown:
        raise DatasetError(f"tensors of an unknown meaning: {', '.join(unknown)}")
    for key in ("env", "action_type", "observation_clip"):
        if key not in metadata:
            raise DatasetError(f"metadata missing: {key}")
    extra: dict[str, Any] = {key: metadata[key] for key in TEXT_KEYS if key in metadata}
    for key in JSON_KEYS:
        if key in metadata:
            extra[key] = _json(key, metadata[key], dict | list if key == "learners" else dict)
    try:
        clip = float(metadata["observation_clip"])
    except ValueError:
        raise DatasetError(f"observation_clip={metadata['observation_clip']!r}: expected a number") from None
    _check_returns(extra.get("returns", {}))
    return DistilledDataset(
        **tensors,
        env=metadata["env"],
        action_type=metadata["action_type"],  # type: ignore[arg-type]
        observation_clip=clip,
        metadata=extra,
    )


def _json(key: str, text: str, kind: Any) -> Any:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise DatasetError(f"{key}: not JSON") from None
    if not isinstance(value, kind):
        raise DatasetError(f"{key}: a JSON {type(value).__name__}, which it cannot be")
    return value


def _check_returns(returns: dict[str, Any]) -> None:
    for family, kinds in returns.items():
        for kind, entry in kinds.items() if isinstance(kinds, dict) else [(None, None)]:
            numbers = (
                [entry.get(name) for name in ("mean", "ci95", "learners", "episodes")]
                if isinstance(entry, dict)
                else []
            )
            if kind not in ("sampled", "greedy") or not numbers or not all(isinstance(x, int | float) for x in numbers):
                raise DatasetError(
                    f"returns[{family!r}]: expected {{sampled|greedy: {{mean, ci95, learners, episodes}}}}"
                )
