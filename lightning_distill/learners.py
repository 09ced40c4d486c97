"""Learner families: distributions over fresh networks, drawn K at a time with their parameters stacked.

A family answers two questions: how K learners are drawn (``draw``) and how K stacked learners map K batches of
observations to action logits or means (``forward``). Parameters are a dict of tensors whose first dimension is K, so that
one call teaches, runs or differentiates all K learners. What no step changes (buffers, frozen parameters) is in the same
dict under names that begin with ``FIXED``. Learners of several architectures stand in one dict as groups, each with its K.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]
#: What makes a module of one architecture, called with (observation_shape, outputs).
Factory = Callable[[Sequence[int], int], nn.Module]

#: Marks, in the names of ``Params``, a buffer or a frozen parameter.
FIXED = "fixed:"
#: Ends, in the names of ``Params``, the name of a group: learners of one architecture beside those of others.
GROUP = "|"


def _mkl_is_slow() -> bool:
    """Whether MKL, by which torch computes functions of many numbers, takes another maker's processor for an old one."""
    try:
        with open("/proc/cpuinfo") as cpu:
            return "AuthenticAMD" in cpu.read(200)
    except OSError:
        return False


#: Whether tanh is the logistic function's.
LOGISTIC_TANH = _mkl_is_slow()


def tanh(inputs: Tensor) -> Tensor:
    """tanh; where that is faster, on AMD's processors in single precision, by the logistic function: 2 σ(2x) − 1, to 2·10⁻⁷.

    There ``torch.tanh`` takes ten times as long for a number as the logistic function does, and was a quarter of all updates;
    on Intel's it takes a quarter of this one's time. What is compiled has a tanh of its own.
    """
    if (
        not LOGISTIC_TANH
        or inputs.device.type != "cpu"
        or inputs.dtype != torch.float32
        or torch.compiler.is_compiling()
    ):
        return torch.tanh(inputs)
    return _LogisticTanh.apply(inputs) if torch.is_grad_enabled() else _LogisticTanh.forward(inputs)


class _LogisticTanh(torch.autograd.Function):
    """With the derivative of tanh: that of the expression itself is four operations instead of one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.mul(2).sigmoid_().mul_(2).sub_(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(gradient, *ctx.saved_tensors)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "sin": torch.sin,
}


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
            if value < least:
                raise ValueError(f"MLP.{name}={value}: allowed are integers ≥ {least}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MLP.activation={activation!r}: allowed are {', '.join(ACTIVATIONS)}")
        if init not in self._INITIALISERS:
            raise ValueError(f"MLP.init={init!r}: allowed are {', '.join(self._INITIALISERS)}")
        if norm not in ("none", "layer"):
            raise ValueError(f"MLP.norm={norm!r}: allowed are none, layer")
        self.width, self.depth, self.activation = width, depth, activation
        self.init, self.gain, self.output_gain, self.norm = init, gain, output_gain, norm

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        sizes = [math.prod(observation_shape)] + [self.width] * self.depth + [outputs]
        params: Params = {}
        for layer, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            gain = self.output_gain if layer == self.depth else self.gain
            weight, bias = self._INITIALISERS[self.init](learners, fan_in, fan_out, gain, device)
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
            [B, *observation_shape] to [B, outputs], of the same architecture at each call, all that is random in it being
            parameters and buffers. By class path in a config.
    """

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        # One for each shape of learner ever drawn: it holds the architecture alone, so old draws stay valid.
        self._stacks: dict[frozenset, StackedModules] = {}

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        modules = [self.factory(tuple(observation_shape), outputs) for _ in range(learners)]
        params = stack_parameters(modules)
        self._stacks.setdefault(_shapes(params), StackedModules(copy.deepcopy(modules[0])))
        return {name: value.to(device) for name, value in params.items()}

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        return self._stacks[_shapes(params)].forward(params, observations)

    def features(self, params: Params, observations: Tensor) -> Tensor:
        return self._stacks[_shapes(params)].features(params, observations)

    def with_output_layer(self, params: Params, weight: Tensor, bias: Tensor) -> Params:
        return self._stacks[_shapes(params)].with_output_layer(params, weight, bias)

    def describe(self) -> dict[str, Any]:
        return {"class_path": "lightning_distill.ModuleFamily", "init_args": {"factory": class_path(self.factory)}}


def described(family: LearnerFamily, known: type[LearnerFamily], arguments: dict[str, Any]) -> dict[str, Any]:
    """A family of a class of this package; one of a subclass, which may draw others, has that one's path."""
    path = f"lightning_distill.{known.__name__}" if type(family) is known else class_path(type(family))
    return {"class_path": path, "init_args": arguments}


def imported(path: str) -> Any:
    """What a class path ``package.module.Name`` names; whatever its module raises is passed on."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def class_path(factory: Any) -> str:
    """Of a class or function; of a partial one the arguments too."""
    if isinstance(factory, partial):
        if (factory.func.__module__ or "").startswith("jsonargparse"):  # of a config's class_path and init_args
            factory = partial(factory.args[-1], **factory.keywords)
        arguments = [
            *map(_shown, factory.args),
            *(f"{name}={_shown(value)}" for name, value in factory.keywords.items()),
        ]
        return f"functools.partial({', '.join([class_path(factory.func), *arguments])})"
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', type(factory).__name__)}"


def _shown(value: Any) -> str:
    """As Python writes it; of what it knows by its address alone the type."""
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)


def stack_parameters(modules: Sequence[nn.Module]) -> Params:
    """Parameters and buffers of K modules of one architecture, copied, each [K, …].

    Raises:
        ValueError: they differ in name or shape, or have parameters without one.
    """
    for module in modules:
        for name, value in module.named_parameters():
            if is_lazy(value):
                raise ValueError(
                    f"module's {name} has no shape yet: run it once, on torch.zeros(1, *observation_shape)"
                )
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
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


class StackedModules(Learners):
    """K stacked modules of one architecture, run by ``vmap``; one after the other if they have a part, as recurrent layers, that torch
    cannot map.

    Args:
        module: the architecture; it is run in evaluation mode, with parameters of ``stack_parameters``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self._output_layer: str | None = None

    @torch.no_grad()
    def check(self, modules: Sequence[nn.Module], params: Params, observations: Tensor) -> None:
        """Raise ``ValueError`` unless each of these modules does what the stack does with its parameters [K, …].

        What a module keeps beside parameters and buffers would be the first one's for all. One that does not do the same twice is let pass.

        Args:
            observations: [B, *observation_shape].
        """
        if len(modules) < 2:
            return
        together = self.forward(params, observations.expand(len(modules), *observations.shape))
        for index, module in enumerate(modules[1:], 1):
            alone = StackedModules(copy.deepcopy(module))
            own = {name: value[index : index + 1] for name, value in params.items()}
            found = alone.forward(own, observations.unsqueeze(0))
            if torch.allclose(found[0], together[index], rtol=1e-2, atol=1e-3):
                continue
            if torch.equal(found, alone.forward(own, observations.unsqueeze(0))):
                raise ValueError(
                    f"module {index} does something else than the first one with its parameters and buffers: what else differs "
                    "between modules has to be a buffer"
                )

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        return self._run(partial(_call, self.module), params, observations)

    def features(self, params: Params, observations: Tensor) -> Tensor:
        if self._output_layer is None:
            self._output_layer = self._find_output_layer(params, observations)
        return self._run(partial(_inputs, self.module, self._output_layer), params, observations)

    def with_output_layer(self, params: Params, weight: Tensor, bias: Tensor) -> Params:
        names = (f"{self._output_layer}.weight".lstrip("."), f"{self._output_layer}.bias".lstrip("."))
        if (own := params[names[0]].shape[1]) != weight.shape[2]:
            raise UnfitLearner(f"module returns {own} outputs, expected {weight.shape[2]}")
        return params | {
            names[0]: weight.mT.to(params[names[0]].dtype),
            names[1]: bias[:, 0].to(params[names[1]].dtype),
        }

    @staticmethod
    def _run(function: Forward, params: Params, observations: Tensor) -> Tensor:
        with _differentiable_attention():
            if len(observations) == 1:
                outputs = function({name: value[0] for name, value in params.items()}, observations[0])
                return outputs.unsqueeze(0) if isinstance(outputs, Tensor) else outputs
            try:
                return torch.func.vmap(function, randomness="different")(params, observations)
            except RuntimeError as error:
                if "Batching rule not implemented" not in str(error):
                    raise
            each = ({name: value[k] for name, value in params.items()} for k in range(len(observations)))
            found = [function(own, inputs) for own, inputs in zip(each, observations, strict=True)]
            return torch.stack(found) if isinstance(found[0], Tensor) else found[0]

    @torch.no_grad()
    def _find_output_layer(self, params: Params, observations: Tensor) -> str:
        """Name of the ``nn.Linear`` whose output is the module's: the last one called, if changing it changes nothing else.

        Raises:
            UnfitLearner: there is none, or it has no bias, is frozen, parametrised or used twice.
        """
        params, observations = {name: value[:1] for name, value in params.items()}, observations[:1]
        called: list[str] = []
        handles = [
            part.register_forward_hook(lambda *_, name=name: called.append(name))
            for name, part in self.module.named_modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            outputs = self.forward(params, observations)
        finally:
            for handle in handles:
                handle.remove()
        advice = "teach it by step_rule='sgd', or end it with an nn.Linear of its own"
        if not isinstance(outputs, Tensor):
            raise UnfitLearner(f"module returns a {type(outputs).__name__}, expected a tensor")
        if not called:
            raise UnfitLearner(f"newton needs a last layer nn.Linear, which the module does not have: {advice}")
        name, weights = called[-1], [f"{called[-1]}.{kind}".lstrip(".") for kind in ("weight", "bias")]
        for weight in weights:
            if weight not in params:
                raise UnfitLearner(
                    f"newton sets weight and bias of the last layer, but {weight!r} is no trainable parameter: {advice}"
                )
        # Whatever else may happen between that layer and the outputs shows when it is another layer.
        self._output_layer = name
        features = self._run(partial(_inputs, self.module, name), params, observations)
        weight, bias = (torch.arange(1, p.numel() + 1).to(p).view(p.shape).cos() for p in (params[w] for w in weights))
        weight, bias = weight.mT, bias[:, None]
        changed = self.with_output_layer(params, weight, bias)
        expected = features @ weight + bias if features.shape[:2] == outputs.shape[:2] else outputs.new_empty(0)
        found = self.forward(changed, observations)
        if expected.shape != found.shape or not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3):
            raise UnfitLearner(
                f"newton needs outputs that are those of the last nn.Linear called, {name!r}, but they are not: {advice}"
            )
        return name


def _call(module: nn.Module, params: Params, observations: Tensor) -> Tensor:
    state = {name.removeprefix(FIXED): value for name, value in params.items()}
    return torch.func.functional_call(module, state, (observations,))


def _inputs(module: nn.Module, layer: str, params: Params, observations: Tensor) -> Tensor:
    """What the layer of that name is given."""
    seen: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs, named: seen.append(inputs[0] if inputs else named["input"]), with_kwargs=True
    )
    try:
        _call(module, params, observations)
    finally:
        handle.remove()
    return seen[-1]


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
