"""Anybody's modules as learners: K of one architecture with their parameters stacked, drawn by what makes one of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from .class_paths import class_path
from .learners import FIXED, Factory, LearnerFamily, Learners, Params, UnfitLearner

Forward = Callable[[Params, Tensor], Tensor]


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


def stack_parameters(modules: Sequence[nn.Module]) -> Params:
    """Parameters and buffers of K modules of one architecture, copied, each [K, …].

    Raises:
        ValueError: they differ in name or shape, or have parameters without one.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: is a {type(module).__name__}, expected an nn.Module")
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
