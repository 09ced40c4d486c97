"""Learner families: distributions over fresh networks, drawn K at a time with their parameters stacked.

A family answers two questions: how K learners are drawn (``draw``) and how K stacked learners map K batches of
observations to action logits or means (``forward``). Parameters are a dict of tensors whose first dimension is K, so that
one call teaches, runs or differentiates all K learners. What no step changes (buffers, frozen parameters) is in the same
dict under names that begin with ``FIXED``.
"""

from __future__ import annotations

import contextlib
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]

#: Marks, in the names of ``Params``, a buffer or a frozen parameter.
FIXED = "fixed:"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "sin": torch.sin,
}


class LearnerFamily(ABC):
    """A distribution over learners: an architecture and how it is initialised.

    ``forward`` depends on its arguments alone, so that several draws of one family can be in use at once.
    """

    @abstractmethod
    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        """Parameters of ``learners`` fresh learners, each tensor [learners, …].

        Uses torch's global random state. Buffers and frozen parameters have the prefix ``FIXED``.
        """

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

    Learners are taught and act in evaluation mode, as in :func:`lightning_distill.teach`.

    Args:
        factory: called as ``factory(observation_shape, outputs)``; returns a module that maps observations
            [B, *observation_shape] to [B, outputs], initialised at random, of the same architecture at each call. By
            class path in a config.
    """

    def __init__(self, factory: Callable[[Sequence[int], int], nn.Module]) -> None:
        self.factory = factory
        # One for each shape of learner ever drawn: it holds the architecture alone, so old draws stay valid.
        self._skeletons: dict[frozenset, nn.Module] = {}

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        modules = [self.factory(tuple(observation_shape), outputs) for _ in range(learners)]
        skeleton, params = stack_modules(modules)
        self._skeletons[_shapes(params)] = skeleton
        return {name: value.to(device) for name, value in params.items()}

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        return run_stacked(self._skeletons[_shapes(params)], params, observations)

    def describe(self) -> dict[str, Any]:
        made = self.factory
        name = f"{getattr(made, '__module__', '?')}.{getattr(made, '__qualname__', type(made).__name__)}"
        return {"class_path": "lightning_distill.ModuleFamily", "init_args": {"factory": name}}


def stack_modules(modules: Sequence[nn.Module]) -> tuple[nn.Module, Params]:
    """K modules of one architecture as parameters [K, …], copied, and a module in evaluation mode to run them with.

    Raises:
        ValueError: their parameters differ in name or shape.
    """
    states = [
        {FIXED * (not parameter.requires_grad) + name: parameter for name, parameter in module.named_parameters()}
        | {FIXED + name: buffer for name, buffer in module.named_buffers()}
        for module in modules
    ]
    for index, state in enumerate(states):
        for name in states[0].keys() | state.keys():
            first, this = (s[name].shape if name in s else None for s in (states[0], state))
            if first != this:
                raise ValueError(f"modules of one architecture are needed: {name} is {first} in 0, {this} in {index}")
    params = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
    return copy.deepcopy(modules[0]).eval(), params


def run_stacked(skeleton: nn.Module, params: Params, observations: Tensor) -> Tensor:
    """Outputs [K, B, d] of K stacked modules for observations [K, B, *obs]; both as ``stack_modules`` returns them."""

    def run_one(params: Params, observations: Tensor) -> Tensor:
        state = {name.removeprefix(FIXED): value for name, value in params.items()}
        return torch.func.functional_call(skeleton, state, (observations,))

    with _differentiable_attention():
        return torch.func.vmap(run_one, randomness="different")(params, observations)


@contextlib.contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Attention in plain operations: the fused ones know neither ``torch.func``'s batches nor second derivatives."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _shapes(params: Params) -> frozenset:
    return frozenset((name, value.shape[1:]) for name, value in params.items())


def family_from(description: Mapping[str, Any]) -> LearnerFamily:
    """The family that ``describe`` described. Of a file's words only this package's families are built, nothing imported.

    Raises:
        ValueError: any other class, or arguments it does not take.
    """
    from .nature import NatureCNN

    path, arguments = description.get("class_path"), description.get("init_args", {})
    built = {f"lightning_distill.{family.__name__}": family for family in (MLP, NatureCNN)}
    if path not in built:
        raise ValueError(f"class_path={path!r}: from a description only {' and '.join(built)} are built")
    try:
        return built[path](**arguments)
    except TypeError as error:
        raise ValueError(f"init_args={arguments!r}: not accepted by {path} ({error})") from None
