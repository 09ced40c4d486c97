"""What a learner has to know of an environment: shapes and kinds, nothing that can be stepped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """Input that cannot work: the message names the field, the value and what is allowed."""


def reason(error: Exception) -> str:
    """What an error says; its class, where it says nothing."""
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class EnvSpec:
    """Shapes and kinds of one environment, in plain types so that a checkpoint can hold it.

    Attributes:
        id: Gymnasium id, or class path of a TorchRL environment.
        kwargs: keyword arguments it was made with.
        time_limit: steps after which Gymnasium truncates an episode; None if it does not, or nobody says.
        observation_dtype: ``float32``, or ``uint8`` for Atari frames, which are kept as bytes until they are fed.
        observation_shape: shape of one observation.
        action_type: ``discrete`` (one of ``actions`` choices) or ``continuous`` (a vector of ``actions`` numbers).
        actions: number of choices, or length of the action vector: the learner's number of outputs.
        action_low, action_high: bounds of a continuous action, in the environment's units; empty if discrete.
    """

    id: str
    observation_shape: tuple[int, ...]
    action_type: Literal["discrete", "continuous"]
    actions: int
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    observation_dtype: Literal["float32", "uint8"] = "float32"
    time_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("observation_shape", "action_low", "action_high"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def frames(self) -> bool:
        """Whether observations are stacked frames of bytes."""
        return self.observation_dtype == "uint8"

    @property
    def interface(self) -> tuple[tuple[int, ...], str, int]:
        """Shape of observations, kind of action, outputs: what a policy or a dataset has to have to play here."""
        return self.observation_shape, self.action_type, self.actions

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
