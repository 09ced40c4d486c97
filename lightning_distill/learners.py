"""Learner families: distributions over fresh networks, drawn K at a time with their parameters stacked.

A family answers two questions: how K learners are drawn (``draw``) and how K stacked learners map K batches of
observations to action logits or means (``forward``). Parameters are a dict of tensors whose first dimension is K, so that
one call teaches, runs or differentiates all K learners.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "sin": torch.sin,
}


class LearnerFamily(ABC):
    """A distribution over learners: an architecture and how it is initialised."""

    @abstractmethod
    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        """Parameters of ``learners`` fresh learners, each tensor [learners, …]. Uses torch's global random state."""

    @abstractmethod
    def forward(self, params: Params, observations: Tensor) -> Tensor:
        """Outputs [K, B, outputs] of K stacked learners for observations [K, B, *observation_shape]."""

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
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        activation: Literal["tanh", "relu", "gelu", "silu", "elu", "sin"] = "tanh",
        init: Literal["orthogonal", "xavier", "kaiming", "default"] = "orthogonal",
        gain: float = math.sqrt(2),
        output_gain: float = 0.01,
    ) -> None:
        for name, value, least in (("width", width, 1), ("depth", depth, 0)):
            if value < least:
                raise ValueError(f"MLP.{name}={value}: allowed are integers ≥ {least}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP.activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if init not in self._INITIALISERS:
            raise ValueError(f"MLP.init={init!r}: allowed are {', '.join(self._INITIALISERS)}")
        self.width, self.depth, self.activation = width, depth, activation
        self.init, self.gain, self.output_gain = init, gain, output_gain

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        sizes = [math.prod(observation_shape)] + [self.width] * self.depth + [outputs]
        params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            gain = self.output_gain if layer == self.depth else self.gain
            weight, bias = self._INITIALISERS[self.init](learners, fan_in, fan_out, gain, device)
            params[f"{layer}.weight"], params[f"{layer}.bias"] = weight, bias
        return params

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        hidden = observations.flatten(2)
        for layer in range(self.depth + 1):
            # One batched product for all K learners: several times faster than vmap over a module.
            hidden = torch.baddbmm(params[f"{layer}.bias"], hidden, params[f"{layer}.weight"])
            if layer < self.depth:
                hidden = ACTIVATIONS[self.activation](hidden)
        return hidden

    def describe(self) -> dict[str, Any]:
        names = ("width", "depth", "activation", "init", "gain", "output_gain")
        return {"class_path": "lightning_distill.MLP", "init_args": {name: getattr(self, name) for name in names}}

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

    _INITIALISERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "orthogonal": _orthogonal.__func__,
        "xavier": _xavier.__func__,
        "kaiming": _kaiming.__func__,
        "default": _default.__func__,
    }


class ModuleFamily(LearnerFamily):
    """Any ``nn.Module`` as a family: a fresh one is built for each learner, and K of them are run by ``vmap``.

    Args:
        factory: called as ``factory(observation_shape, outputs)``; returns a module that maps observations
            [B, *observation_shape] to [B, outputs], initialised at random. By class path in a config.
    """

    def __init__(self, factory: Callable[[Sequence[int], int], nn.Module]) -> None:
        self.factory = factory

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        modules = [self.factory(tuple(observation_shape), outputs) for _ in range(learners)]
        params, buffers = torch.func.stack_module_state(modules)
        self._buffers = {name: value.to(device) for name, value in buffers.items()}
        self._skeleton = modules[0].to("meta")
        return {name: value.detach().to(device) for name, value in params.items()}

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        def one(params: Params, buffers: Params, observations: Tensor) -> Tensor:
            return torch.func.functional_call(self._skeleton, (params, buffers), (observations,))

        return torch.func.vmap(one, randomness="different")(params, self._buffers, observations)

    def describe(self) -> dict[str, Any]:
        made = self.factory
        name = f"{getattr(made, '__module__', '?')}.{getattr(made, '__qualname__', type(made).__name__)}"
        return {"class_path": "lightning_distill.ModuleFamily", "init_args": {"factory": name}}
