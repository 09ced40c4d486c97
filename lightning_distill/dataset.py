"""DistilledDataset: the exported artefact, its file (format 1, see README) and the zoo.

Needs torch and safetensors alone; nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FORMAT = "1"
#: Metadata that is structured; every other entry is text.
JSON_KEYS: dict[str, type | tuple[type, ...]] = {
    "env_kwargs": dict,
    "learners": (list, dict),
    "returns": dict,
    "versions": dict,
}
INTEGER_KEYS = ("env_steps", "seed")
#: Metadata that are fields of their own, or what this version writes anyway.
FIELD_KEYS = ("format", "env", "action_type", "loss", "steps", "observation_clip")
REQUIRED = ("observations", "targets", "learning_rate", "observation_mean", "observation_std")
OPTIONAL = ("log_std", "line_search_scale", "newton_ridge")
ENCODER = "encoder."
ENCODER_LEVELS = ("0", "1", "2", "3", "4")
#: Far more than a config and a table of returns need; a larger one is no honest file.
METADATA_LIMIT = 1_000_000


class DatasetError(ValueError):
    """A file that is no distilled dataset of a known format: the message says what is wrong with it."""


def normalise(observation: Tensor, mean: Tensor, std: Tensor, clip: float) -> Tensor:
    """An environment's observation s as learners are fed it: clip((s − mean) / std, ±clip)."""
    # Not a division and a clamp, whose derivatives are twice as many passes over the observations.
    return F.hardtanh((observation - mean) * std.reciprocal(), -clip, clip)


@dataclass(frozen=True, eq=False)
class DistilledDataset:
    """n synthetic (observation, target) pairs and all that a stranger needs to teach from them and act.

    Attributes:
        observations: [n, *obs], already normalised: learners are fed them as they are, or as the encoder returns them.
            With an encoder they may also be what it returns, [n, *features]; then it is not applied to them again.
        targets: [n, d], logits (discrete) or action means in the environment's units (continuous).
        learning_rate: scalar η of the one SGD step.
        observation_mean, observation_std: [*obs]; an environment's observation s is fed to the policy as
            clip((s − mean) / std, ±observation_clip).
        env: Gymnasium id.
        action_type: ``discrete`` or ``continuous``.
        log_std: [d], log standard deviation of the taught policy (continuous only).
        observation_clip: c, see above.
        line_search_scale, newton_ridge: scalars α and λ of the step rules of these names; optional.
        encoder: state dict of the encoder whose output learners are fed in teaching and acting; empty unless
            ``encoder_level`` > 0.
        metadata: everything else the file says (``docs/file_format.md``), in plain JSON values: control
            characters are escaped, numbers that are not finite are None (in ``env_kwargs`` they may be infinite).

    Raises:
        DatasetError: a field is not what format 1 says; the message names it, its value and what is expected.
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
    line_search_scale: Tensor | None = None
    newton_ridge: Tensor | None = None
    encoder: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What is shown on a terminal later can hold no escape sequence; a config alone has several lines.
        texts = self.metadata.items()
        metadata = {
            _plain(key): _plain(value, "\n\t" if key == "config" else "", key == "env_kwargs") for key, value in texts
        }
        object.__setattr__(self, "metadata", metadata)
        self._check_tensors()
        self._check_text()

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in the file."""
        named = {name: value for name in REQUIRED + OPTIONAL if (value := getattr(self, name)) is not None}
        return named | {ENCODER + name: value for name, value in self.encoder.items()}

    def _check_tensors(self) -> None:
        for name, value in self._tensors().items():
            _require(isinstance(value, Tensor), f"{name}: a {type(value).__name__}, expected a torch.Tensor")
            _require(value.dtype == torch.float32, f"{name}: dtype {value.dtype}, expected torch.float32")
            _require(bool(value.isfinite().all()), f"{name}: holds NaN or infinity")
        shape = list(self.observations.shape)
        _require(len(shape) >= 2 and 0 not in shape, f"observations: shape {shape}, expected [n, *obs], n ≥ 1")
        _require(self.targets.dim() == 2, f"targets: shape {list(self.targets.shape)}, expected [n, d]")
        n, d = self.targets.shape
        _require(d >= 1, f"targets: shape {[n, d]}, expected at least one output")
        _require(len(self.observations) == n, f"observations: {len(self.observations)} rows, but targets has {n}")
        scalars = ("learning_rate", "line_search_scale", "newton_ridge")
        # Pairs that an encoder has encoded already have another shape than what the environment shows.
        shown = list(self.observation_mean.shape) if self.encoder else shape[1:]
        expected = {"log_std": [d], "observation_mean": shown, "observation_std": shown}
        for name, value in self._tensors().items():
            if name in scalars or name in expected:
                wanted = expected.get(name, [])
                _require(list(value.shape) == wanted, f"{name}: shape {list(value.shape)}, expected {wanted}")
            if name in (*scalars, "observation_std"):
                _require(bool((value > 0).all()), f"{name}: smallest value {value.min().item()}, must be positive")

    def _check_text(self) -> None:
        kinds = ("discrete", "continuous")
        _require(self.action_type in kinds, f"action_type={self.action_type!r}: allowed are {', '.join(kinds)}")
        continuous = self.action_type == "continuous"
        _require(continuous == (self.log_std is not None), "log_std: needed for continuous actions, and only for them")
        clip = self.observation_clip
        _require(math.isfinite(clip) and clip > 0, f"observation_clip={clip}: must be positive and finite")
        shown = bool(self.env) and self.env.isprintable() and " " not in self.env
        _require(shown, f"env={self.env!r}: expected a Gymnasium id")
        for key in FIELD_KEYS:
            _require(key not in self.metadata, f"metadata[{key!r}]: is a field of its own")
        for key, kind in JSON_KEYS.items():
            value = self.metadata.get(key)
            _require(value is None or isinstance(value, kind), f"{key}: a JSON {type(value).__name__}, cannot be one")
        for key in INTEGER_KEYS:
            value = self.metadata.get(key, 0)
            _require(isinstance(value, int) and not isinstance(value, bool), f"{key}={value!r}: expected an integer")
        _check_returns(self.metadata.get("returns") or {})
        level = str(self.metadata.get("encoder_level", "0"))
        _require(level in ENCODER_LEVELS, f"encoder_level={level!r}: allowed are {', '.join(ENCODER_LEVELS)}")
        has = f"{len(self.encoder)} tensors {ENCODER}*"
        _require((level != "0") == bool(self.encoder), f"encoder_level={level} with {has}: levels above 0 have them")
        _require(all(name.isprintable() for name in self.encoder), f"{ENCODER}*: names with control characters")

    @property
    def pairs(self) -> int:
        """n, the number of pairs."""
        return len(self.targets)

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of what the environment shows."""
        return tuple(self.observation_mean.shape)

    @property
    def encoded(self) -> bool:
        """Whether the pairs are features of the encoder already, rather than what the environment shows."""
        return self.observations.shape[1:] != self.observation_mean.shape

    @property
    def learner_shape(self) -> tuple[int, ...]:
        """Of what a learner is fed: the observation's, or with an encoder that of its features."""
        return tuple(self.learner_inputs().shape[1:])

    @property
    def outputs(self) -> int:
        """d: number of actions (discrete) or length of the action vector (continuous)."""
        return self.targets.shape[1]

    @property
    def encoder_level(self) -> int:
        """How many of a learner's first layers are the encoder that comes with the dataset; 0: none."""
        return int(self.metadata.get("encoder_level", 0))

    @property
    def step_rule(self) -> str:
        """The step rule recommended for learners of other kinds than those trained on; ``sgd`` is the plain step."""
        return str(self.metadata.get("step_rule", "sgd"))

    @property
    def env_kwargs(self) -> dict[str, Any]:
        return dict(self.metadata.get("env_kwargs") or {})

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
        """An environment's observations [..., *obs] as the policy is fed them."""
        return normalise(observations, self.observation_mean, self.observation_std, self.observation_clip)

    def make_encoder(self) -> nn.Module:
        """What stands between normaliser and learner, frozen: [..., *obs] → [..., *features]; at level 0 the identity.

        Raises:
            ValueError: the encoder is not the first layers of a Nature CNN.
        """
        from .nature import encoder_from

        return encoder_from(self.encoder)

    def learner_inputs(self) -> Tensor:
        """The pairs' inputs as learners are fed them, [n, *features]: without an encoder, ``observations``."""
        if self.encoded:
            return self.observations
        with torch.no_grad():
            return self.make_encoder()(self.observations)

    def to(self, device: torch.device | str) -> DistilledDataset:
        """The same dataset with its tensors on a device."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return dataclasses.replace(self, **_as_fields(moved))

    def with_metadata(self, **entries: Any) -> DistilledDataset:
        """The same dataset with entries of its metadata added or replaced."""
        return dataclasses.replace(self, metadata={**self.metadata, **entries})

    def __repr__(self) -> str:
        lines = [
            f"DistilledDataset: {self.pairs} pairs for {self.env}, {self.nbytes:,} bytes",
            f"  observations {list(self.observations.shape)}  targets {list(self.targets.shape)} ({self.action_type})"
            f"  learning rate {self.learning_rate.item():.4g}",
        ]
        if self.encoder_level:
            lines.append(f"  encoder of level {self.encoder_level}, {len(self.encoder)} tensors")
        for family, kinds in (self.metadata.get("returns") or {}).items():
            for kind, entry in kinds.items():
                ci95 = "" if entry.get("ci95") is None else f" ± {entry['ci95']:.1f}"
                lines.append(
                    f"  return {entry['mean']:.1f}{ci95} ({family}, {kind}, "
                    f"{entry['learners']} fresh learners × {entry['episodes']} episodes)"
                )
        for key in ("step_rule", "env_steps", "seed", "created", "license"):
            if key in self.metadata:
                lines.append(f"  {key}: {self.metadata[key]}")
        # A file may say anything at any length; what is shown stays on a screen.
        return "\n".join(line[:160] for line in lines[:40])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write format 1, atomically: a reader finds the old file or the whole new one."""
        from safetensors.torch import save

        entries = {
            "format": FORMAT,
            "env": self.env,
            "action_type": self.action_type,
            "loss": "mse",
            "steps": "1",
            "observation_clip": repr(float(self.observation_clip)),
            "step_rule": "sgd",
            "encoder_level": "0",
        }
        for key, value in self.metadata.items():
            # A range in env_kwargs may have no end; elsewhere no number is infinite.
            entries[key] = json.dumps(value, allow_nan=key == "env_kwargs") if key in JSON_KEYS else str(value)
        _check_size(entries)
        content = save(
            {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in self._tensors().items()
            },
            entries,
        )
        return write_atomically(path, content)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Replace ``path`` by ``content`` in one step, so that a crash or a full disk leaves the old file whole."""
    target = Path(path).resolve()  # a link goes on leading there
    if target.exists() and not target.is_file():
        raise OSError(f"{str(path)!r} is no file that can be replaced by another")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return Path(path)


def zoo() -> dict[str, Path]:
    """Name → file of the datasets that come with the package."""
    folder = Path(str(files("lightning_distill") / "zoo"))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(name_or_path: str | os.PathLike[str]) -> DistilledDataset:
    """A distilled dataset from the zoo (``load("ant")``) or from a file. Nothing in the file is executed.

    Raises:
        DatasetError: the file is missing, broken, of an unknown format, or its content is not what format 1 says; one
            line.
    """
    shipped = zoo()
    path = shipped.get(str(name_or_path), Path(name_or_path))
    try:
        if not path.exists():
            near = difflib.get_close_matches(str(name_or_path), shipped, cutoff=0.7)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lightning-distill list` shows what is"
            raise DatasetError(f"no such file, and not in the zoo; {hint}")
        if not path.is_file():
            raise DatasetError("not a file")
        return _from_file(*_read(path))
    except (DatasetError, OSError) as error:
        raise DatasetError(f"{_plain(str(path))}: {_plain(str(error))[:300]}") from None
    except RecursionError:
        raise DatasetError(_plain(f"{path}: metadata nested too deeply")) from None


def as_dataset(dataset: DistilledDataset | str | os.PathLike[str]) -> DistilledDataset:
    """A dataset, given itself or by what :func:`load` is given."""
    if not isinstance(dataset, DistilledDataset | str | os.PathLike):
        raise DatasetError(
            f"dataset: is a {type(dataset).__name__}, expected a DistilledDataset, a name in the zoo or a path"
        )
    return dataset if isinstance(dataset, DistilledDataset) else load(dataset)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Copies: the file is mapped into memory, and may be replaced or cut while the dataset is in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata  # noqa: SIM118
    except Exception as error:  # which ones a broken file can provoke is the library's business
        why = "a checkpoint? A run's dataset is its distilled.safetensors" if zipfile.is_zipfile(path) else error
        raise DatasetError(f"not a readable safetensors file ({why})") from None


def _from_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> DistilledDataset:
    _check_size(metadata)
    for key, allowed in (("format", FORMAT), ("loss", "mse"), ("steps", "1")):
        _require(metadata.get(key) == allowed, f"{key}={metadata.get(key)!r}: this version reads {allowed!r}")
    missing = [name for name in REQUIRED if name not in tensors]
    _require(not missing, f"tensors missing: {', '.join(missing)}")
    unknown = sorted(name for name in tensors if name not in REQUIRED + OPTIONAL and not name.startswith(ENCODER))
    _require(not unknown, f"tensors of an unknown meaning: {', '.join(unknown)}")
    missing = [key for key in FIELD_KEYS if key not in metadata]
    _require(not missing, f"metadata missing: {', '.join(missing)}")
    return DistilledDataset(
        **_as_fields(tensors),
        env=metadata["env"],
        action_type=metadata["action_type"],  # type: ignore[arg-type]
        observation_clip=_parse("observation_clip", metadata["observation_clip"], float),
        metadata={key: _entry(key, text) for key, text in metadata.items() if key not in FIELD_KEYS},
    )


def _check_size(metadata: dict[str, str]) -> None:
    size = sum(len(key) + len(text) for key, text in metadata.items())
    _require(size <= METADATA_LIMIT, f"metadata: {size:,} characters, allowed are {METADATA_LIMIT:,}")


def _as_fields(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors by their names in the file as arguments of ``DistilledDataset``."""
    fields: dict[str, Any] = {name: value for name, value in tensors.items() if not name.startswith(ENCODER)}
    fields["encoder"] = {
        name.removeprefix(ENCODER): value for name, value in tensors.items() if name.startswith(ENCODER)
    }
    return fields


def _entry(key: str, text: str) -> Any:
    if key in JSON_KEYS:
        return _parse(key, text, json.loads)
    return _parse(key, text, int) if key in INTEGER_KEYS else text


def _parse(key: str, text: str, parse: Any) -> Any:
    try:
        return parse(text)
    except ValueError:  # also of a number too long to read
        kind = "JSON" if parse is json.loads else f"a number ({parse.__name__})"
        raise DatasetError(f"{key}={text[:40]!r}: expected {kind}") from None


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise DatasetError(message)


def _plain(value: Any, keep: str = "", infinite: bool = False) -> Any:
    """A JSON value whose texts hold printable characters alone (others escaped) and whose numbers are finite (or infinite) or None."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(entry, keep, infinite) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, keep, infinite) for entry in value]
    unknown = isinstance(value, float) and not (math.isfinite(value) or (infinite and math.isinf(value)))
    return None if unknown else value


def _check_returns(returns: dict[str, Any]) -> None:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and abs(value) < 1e300

    for family, kinds in returns.items():
        valid = isinstance(kinds, dict) and all(
            kind in ("sampled", "greedy")
            and isinstance(entry, dict)
            and all(number(entry.get(name)) for name in ("mean", "learners", "episodes"))
            and (entry.get("ci95") is None or number(entry["ci95"]))
            for kind, entry in kinds.items()
        )
        expected = "{sampled|greedy: {mean, ci95, learners, episodes}}"
        _require(valid, f"returns[{family!r}]: expected {expected}")
