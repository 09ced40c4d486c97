"""Learner families: distributions over fresh networks, drawn K at a time with their parameters stacked.

A family answers two questions: how K learners are drawn (``draw``) and how K stacked learners map K batches of
observations to action logits or means (``forward``). Parameters are a dict of tensors whose first dimension is K, so that
one call teaches, runs or differentiates all K learners. What no step changes (buffers, frozen parameters) is in the same
dict under names that begin with ``FIXED``. Learners of several architectures stand in one dict as groups, each with its K.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .class_paths import described

Params = dict[str, Tensor]
#: What makes a module of one architecture, called with (observation_shape, outputs).
Factory = Callable[[Sequence[int], int], nn.Module]

#: Marks, in the names of ``Params``, a buffer or a frozen parameter.
FIXED = "fixed:"
#: Ends, in the names of ``Params``, the name of a group: learners of one architecture beside those of others.
GROUP = "|"


class UnfitLearner(ValueError):
    """A learner that a step rule cannot teach; the message says why, and what can be done."""


class Learners(ABC):
    """What K stacked learners compute; everything follows from the arguments, so that several stacks can be in use at once."""

    @abstractmethod
    def forward(self, params: Params, observations: Tensor) -> Tensor:
        """Outputs [K, B, outputs] of K stacked learners for observations [K, B, *observation_shape]."""

    def features(self, params: Params, observations: Tensor) -> Tensor:
        """Inputs [K, B, h] of the linear output layer, for observations [K, B, *observation_shape].

        Raises:
            UnfitLearner: the outputs are not those of a linear layer, or it is not known.
        """
        raise UnfitLearner(f"{type(self).__name__} does not say what its output layer is: teach it by step_rule='sgd'")

    def with_output_layer(self, params: Params, weight: Tensor, bias: Tensor) -> Params:
        """The same learners with another output layer: outputs = features @ weight [K, h, d] + bias [K, 1, d]."""
        raise NotImplementedError

    def map(self, function: Callable[[Learners, Params], Params], params: Params) -> Params:
        """``function`` of these learners and their parameters; of each group where there are several architectures."""
        return function(self, params)


def count_learners(params: Params) -> int:
    """K, the number of stacked learners, over all groups."""
    return sum({name.removeprefix(FIXED).rpartition(GROUP)[0]: len(value) for name, value in params.items()}.values())


class LearnerFamily(Learners):
    """A distribution over learners: an architecture and how it is initialised."""

    @abstractmethod
    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        """Parameters of ``learners`` fresh learners, each tensor [learners, …].

        Uses torch's global random state. Buffers and frozen parameters have the prefix ``FIXED``.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Class path and arguments, as a config writes them: enough to draw from the family again."""


class MLP(LearnerFamily):
    """Multi-layer perceptrons; the default is the paper's learner (64-64 tanh, orthogonal, biases 0).

    Args:
        width: units of each hidden layer.
        depth: number of hidden layers; 0 is a linear map.
        activation: between layers: tanh, relu, gelu, silu, elu or sin.
        init: weights: ``orthogonal`` (gain ``gain``, output layer ``output_gain``, biases 0), ``xavier`` (uniform, Glorot
            & Bengio 2010, biases 0), ``kaiming`` (uniform, He et al. 2015, biases 0) or ``default`` (PyTorch's ``nn.Linear``).
        gain: of orthogonal hidden layers.
        output_gain: of an orthogonal output layer.
        norm: ``layer`` normalises each hidden layer before its activation (LayerNorm, Ba et al. 2016), ``none`` does not.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        activation: Literal["tanh", "relu", "gelu", "silu", "elu", "sin"] = "tanh",
        init: Literal["orthogonal", "xavier", "kaiming", "default"] = "orthogonal",
        gain: float = math.sqrt(2),
        output_gain: float = 0.01,
        norm: Literal["none", "layer"] = "none",
    ) -> None:
        for name, value, least in (("width", width, 1), ("depth", depth, 0)):
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"MLP.{name}={value!r}: allowed are integers ≥ {least}")
        for name, value in (("gain", gain), ("output_gain", output_gain)):
            if not math.isfinite(value):
                raise ValueError(f"MLP.{name}={value}: allowed are finite numbers")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP.activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if init not in self.INITIALISERS:
            raise ValueError(f"MLP.init={init!r}: allowed are {', '.join(self.INITIALISERS)}")
        if norm not in ("none", "layer"):
            raise ValueError(f"MLP.norm={norm!r}: allowed are none, layer")
        self.width, self.depth, self.activation = width, depth, activation
        self.init, self.gain, self.output_gain, self.norm = init, gain, output_gain, norm

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        sizes = [math.prod(observation_shape)] + [self.width] * self.depth + [outputs]
        params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            gain = self.output_gain if layer == self.depth else self.gain
            weight, bias = self.INITIALISERS[self.init](learners, fan_in, fan_out, gain, device)
            params[f"{layer}.weight"], params[f"{layer}.bias"] = weight, bias
            if self.norm == "layer" and layer < self.depth:
                params[f"{layer}.norm.weight"] = torch.ones_like(bias)
                params[f"{layer}.norm.bias"] = torch.zeros_like(bias)
        return params

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        features = self.features(params, observations)
        # Whatever precision the layers before ran in: rounded outputs would be another policy.
        with torch.autocast(features.device.type, enabled=False):
            return self._affine(params, self.depth, features.to(params[f"{self.depth}.weight"].dtype))

    def features(self, params: Params, observations: Tensor) -> Tensor:
        hidden = observations.flatten(2)
        for layer in range(self.depth):
            hidden = self._affine(params, layer, hidden)
            if self.norm == "layer":
                hidden = F.layer_norm(hidden, hidden.shape[-1:])
                hidden = hidden * params[f"{layer}.norm.weight"] + params[f"{layer}.norm.bias"]
            hidden = ACTIVATIONS[self.activation](hidden)
        return hidden

    def with_output_layer(self, params: Params, weight: Tensor, bias: Tensor) -> Params:
        return params | {f"{self.depth}.weight": weight, f"{self.depth}.bias": bias}

    @staticmethod
    def _affine(params: Params, layer: int, inputs: Tensor) -> Tensor:
        # One batched product for all K learners: several times faster than vmap over a module.
        return torch.baddbmm(params[f"{layer}.bias"], inputs, params[f"{layer}.weight"])

    def describe(self) -> dict[str, Any]:
        # What learners depend on and no more: families that draw the same ones have one description.
        names = ["depth", "init"]
        names += ["width", "activation", "norm"] if self.depth else []
        if self.init == "orthogonal":
            names += ["gain", "output_gain"] if self.depth else ["output_gain"]
        return described(self, MLP, {name: getattr(self, name) for name in names})

    @staticmethod
    def _orthogonal(k: int, fan_in: int, fan_out: int, gain: float, device: Any) -> tuple[Tensor, Tensor]:
        # QR with the signs of R's diagonal fixed is uniform over orthogonal matrices (Saxe et al. 2014).
        normal = torch.randn(k, max(fan_in, fan_out), min(fan_in, fan_out), device=device)
        q, r = torch.linalg.qr(normal)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        weight = q if fan_in >= fan_out else q.mT
        return (gain * weight).contiguous(), torch.zeros(k, 1, fan_out, device=device)

    @staticmethod
    def _xavier(k: int, fan_in: int, fan_out: int, gain: float, device: Any) -> tuple[Tensor, Tensor]:
        bound = math.sqrt(6 / (fan_in + fan_out))
        weight = torch.empty(k, fan_in, fan_out, device=device).uniform_(-bound, bound)
        return weight, torch.zeros(k, 1, fan_out, device=device)

    @staticmethod
    def _kaiming(k: int, fan_in: int, fan_out: int, gain: float, device: Any) -> tuple[Tensor, Tensor]:
        bound = math.sqrt(6 / fan_in)
        weight = torch.empty(k, fan_in, fan_out, device=device).uniform_(-bound, bound)
        return weight, torch.zeros(k, 1, fan_out, device=device)

    @staticmethod
    def _default(k: int, fan_in: int, fan_out: int, gain: float, device: Any) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(fan_in)
        weight = torch.empty(k, fan_in, fan_out, device=device).uniform_(-bound, bound)
        return weight, torch.empty(k, 1, fan_out, device=device).uniform_(-bound, bound)

    INITIALISERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "orthogonal": _orthogonal.__func__,
        "xavier": _xavier.__func__,
        "kaiming": _kaiming.__func__,
        "default": _default.__func__,
    }
