"""The one step: θ₁ = θ₀ − η ∇θ mean‖f_θ₀(x) − y‖² (Wilhelm & Ventura 2025, section 3).

``sgd_step`` teaches K stacked learners at once and is differentiable in observations, targets and learning rate;
``teach`` and ``teach_many`` apply the same step to anybody's modules and return policies.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .dataset import normalise
from .learners import FIXED, Forward, LearnerFamily, Params, run_stacked, stack_modules

if TYPE_CHECKING:
    from .dataset import DistilledDataset

LOG_STD_NAMES = ("log_std", "logstd")


def sgd_step(forward: Forward, params: Params, observations: Tensor, targets: Tensor, learning_rate: Tensor) -> Params:
    """Parameters of K learners after one plain SGD step on the mean squared error over pairs and dimensions.

    Args:
        forward: (params, observations [K, n, *obs]) → outputs [K, n, d].
        params: of the fresh learners, each [K, …]; those marked ``FIXED`` are returned as they are.
        observations: [n, *obs].
        targets: [n, d].
        learning_rate: scalar η.

    Raises:
        ValueError: the learners return another number of outputs.
    """
    fixed = {name: value for name, value in params.items() if name.startswith(FIXED)}
    trainable = {name: value for name, value in params.items() if name not in fixed}

    def loss(trainable: Params) -> Tensor:
        learners = next(iter(trainable.values())).shape[0]
        outputs = forward(trainable | fixed, observations.expand(learners, *observations.shape))
        _check_outputs(outputs, (learners, *targets.shape))
        # Learners share nothing, so the gradient of the sum holds every learner's own gradient.
        return (outputs - targets).square().flatten(1).mean(1).sum()

    gradients = torch.func.grad(loss)(trainable)
    return {name: value - learning_rate * gradients[name] for name, value in trainable.items()} | fixed


class Policy(nn.Module):
    """A taught module that acts: normalises an observation, encodes it, runs the module, returns an action.

    Its ``state_dict`` holds the taught module's under ``module.``, the encoder's, the normaliser and the log standard
    deviation.

    Args:
        module: the taught module, fed normalised observations, or what the dataset's encoder makes of them; in evaluation
            mode it is the function that was taught.
        dataset: supplies the normaliser, the kind of action and the log standard deviation.
    """

    #: Dimensions before those of one observation or of a batch of them.
    leading: tuple[int, ...] = ()

    def __init__(self, module: nn.Module, dataset: DistilledDataset) -> None:
        super().__init__()
        self.module, self.action_type = module, dataset.action_type
        self.observation_clip = dataset.observation_clip
        self.encoder = dataset.make_encoder()
        self.register_buffer("observation_mean", dataset.observation_mean.clone())
        self.register_buffer("observation_std", dataset.observation_std.clone())
        self.register_buffer("log_std", None if dataset.log_std is None else dataset.log_std.clone())

    @torch.no_grad()
    def forward(
        self,
        observation: np.ndarray | Tensor,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray | Tensor:
        """Action for one observation [*obs] or a batch [B, *obs], as a tensor if a tensor came in, else as numpy.

        Args:
            observation: in the environment's units, of any real dtype.
            sample: draw from the policy's distribution; by default greedy, the largest logit or the mean.
            generator: what is drawn with (on the policy's device); default: torch's global one.

        Returns:
            int64 [] or [B] (discrete); float32 [d] or [B, d] (continuous), in the environment's units and not yet
            clipped to its bounds.

        Raises:
            ValueError: the observation has another shape.
        """
        mean = self.observation_mean
        if not isinstance(observation, Tensor):
            given = torch.from_numpy(np.array(observation, dtype=np.float32, order="C"))
        else:
            given = observation
        batch, single = self._as_batch(given.to(mean.device, mean.dtype))
        inputs = normalise(batch, mean, self.observation_std, self.observation_clip)
        output = self.module(self.encoder(inputs).to(_floating(self.module).dtype)).float()
        action = self._sampled(output, generator) if sample else self._greedy(output)
        action = action.squeeze(len(self.leading)) if single else action
        # [()] makes a scalar of an array without dimensions, as environments expect.
        return action if isinstance(observation, Tensor) else action.cpu().numpy()[()]

    def _as_batch(self, given: Tensor) -> tuple[Tensor, bool]:
        """[*leading, B, *obs], and whether only one observation, without B, was given."""
        shape, leading = list(self.observation_mean.shape), list(self.leading)
        single = list(given.shape) == leading + shape
        batch = given.unsqueeze(len(leading)) if single else given
        if list(batch.shape) != leading + list(batch.shape[len(leading) : len(leading) + 1]) + shape:
            batched = "[" + ", ".join(map(str, [*leading, "B", *shape])) + "]"
            raise ValueError(f"observation: shape {list(given.shape)}, expected {leading + shape} or {batched}")
        return batch, single

    def _greedy(self, output: Tensor) -> Tensor:
        return output.argmax(-1) if self.action_type == "discrete" else output

    def _sampled(self, output: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.action_type == "discrete":
            probabilities = output.softmax(-1).flatten(0, -2)
            return torch.multinomial(probabilities, 1, generator=generator).view(output.shape[:-1])
        noise = torch.randn(output.shape, generator=generator, device=output.device)
        return output + self.log_std.exp() * noise


class StackedPolicy(Policy):
    """K taught learners that act at once: as :class:`Policy`, with K as first dimension everywhere.

    Observations are [K, *obs], one for each learner, or [K, B, *obs]; actions [K] or [K, B] (discrete), [K, d] or
    [K, B, d] (continuous).

    Args:
        forward: (params, observations [K, B, *obs]) → outputs [K, B, d].
        params: of the taught learners, each [K, …].
        dataset: as in :class:`Policy`.
    """

    def __init__(self, forward: Forward, params: Params, dataset: DistilledDataset) -> None:
        super().__init__(StackedLearners(forward, params), dataset)

    @property
    def learners(self) -> int:
        """K, the number of learners."""
        return len(_floating(self.module))

    @property
    def leading(self) -> tuple[int, ...]:
        return (self.learners,)


class StackedLearners(nn.Module):
    """K stacked learners as one module from observations [K, B, *obs] to outputs [K, B, d]."""

    def __init__(self, forward: Forward, params: Params) -> None:
        super().__init__()
        self.run = forward
        self.stacked = nn.ParameterDict(
            {  # a name in a module cannot hold a dot
                name.replace(".", "/"): nn.Parameter(value.detach(), requires_grad=not name.startswith(FIXED))
                for name, value in params.items()
            }
        )

    @property
    def params(self) -> Params:
        return {name.replace("/", "."): value for name, value in self.stacked.items()}

    def forward(self, observations: Tensor) -> Tensor:
        return self.run(self.params, observations)


def teach(
    module: nn.Module, dataset: DistilledDataset, *, in_place: bool = False, log_std: str | None = None
) -> Policy:
    """Teach one module by one SGD step on the dataset and return it as a policy.

    The module is taught, and acts, in evaluation mode: dropout is off and batch normalisation uses its running
    statistics, so that the function that is taught is the one that acts. Only parameters with ``requires_grad`` move;
    shared ones move once. Neither random state nor ``.grad`` changes.

    Args:
        module: maps normalised observations [B, *obs], or the features of the dataset's encoder ([B,
            *dataset.learner_shape]), to logits or action means [B, d]; any architecture, on any one device, of any
            floating dtype.
        dataset: from :func:`lightning_distill.load`.
        in_place: change the caller's module, and leave it in evaluation mode; by default a copy is taught.
        log_std: name of the module's own log standard deviation, [d] or [1, d], which is set to the dataset's after the
            step (continuous only). By default parameters of these shapes called ``log_std`` or ``logstd`` are.

    Raises:
        ValueError: the module does not take the dataset's observations, does not return its number of outputs, or has
            nothing to teach; or the dataset asks for more than the plain step.
    """
    _check_plain(dataset)
    # Autograd needs ordinary tensors, which a surrounding inference mode would not give.
    with torch.inference_mode(False), torch.enable_grad():
        taught = module if in_place else _copied(module)
        modes = [(part, part.training) for part in taught.modules()]
        try:
            own_log_stds = _own_log_stds(taught, dataset, log_std)
            gradients = _gradients(taught.eval(), dataset)
        except BaseException:
            for part, training in modes:
                part.training = training
            raise
        with torch.no_grad():
            for parameter, gradient in gradients:
                parameter -= dataset.learning_rate.to(gradient) * gradient
            for parameter in own_log_stds:
                parameter.copy_(dataset.log_std.view(parameter.shape))
        return Policy(taught, dataset.to(_floating(taught).device)).eval()


def teach_many(
    family: LearnerFamily | Sequence[nn.Module],
    dataset: DistilledDataset,
    learners: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> StackedPolicy:
    """Teach K learners at once, each by one SGD step on the dataset, and return them as one stacked policy.

    Args:
        family: what learners are drawn from, by torch's global random state; or K modules of one architecture, which
            are copied, taught in evaluation mode, and must be such that ``torch.func.vmap`` can run them.
        dataset: from :func:`lightning_distill.load`.
        learners: K, learners to draw; for a family only.
        device: where a family is drawn and taught; modules stay where they are.

    Raises:
        ValueError: as :func:`teach`; or the modules differ in architecture.
    """
    _check_plain(dataset)
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(family, LearnerFamily):
            if learners is None or learners < 1:
                raise ValueError(f"learners={learners}: how many to draw of the family, an integer ≥ 1")
            forward = family.forward
            params = family.draw(learners, dataset.learner_shape, dataset.outputs, device)
        else:
            if learners is not None or not family:
                raise ValueError(f"learners={learners} with {len(family)} modules: allowed is None with 1 or more")
            skeleton, params = stack_modules(family)
            forward = partial(run_stacked, skeleton)
        like = next((value for name, value in params.items() if not name.startswith(FIXED)), None)
        if like is None:
            raise ValueError("learners have no trainable parameter: one step cannot teach them")
        # Copies: of a tensor made in inference mode nothing can be differentiated.
        tensors = (dataset.learner_inputs(), dataset.targets, dataset.learning_rate)
        pairs = [tensor.to(like, copy=True) for tensor in tensors]
        with _accepting(dataset), keep_random_state(like.device):
            taught = sgd_step(forward, params, *pairs)
        return StackedPolicy(forward, taught, dataset.to(like.device)).eval()


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # somebody else's module may hold anything
        raise ValueError(f"module cannot be copied ({error}); in_place=True teaches the module itself") from error


def _check_plain(dataset: DistilledDataset) -> None:
    if dataset.step_rule != "sgd":
        raise ValueError(f"step_rule={dataset.step_rule!r}: only the plain step, 'sgd', is taught by this version")


def _gradients(module: nn.Module, dataset: DistilledDataset) -> list[tuple[nn.Parameter, Tensor]]:
    """Every trainable parameter that the outputs depend on, with the gradient of the loss."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("module has no trainable parameter: one step cannot teach it")
    like = parameters[0]
    # A copy: of a tensor made in inference mode nothing can be differentiated.
    observations = dataset.learner_inputs().to(like.device, like.dtype, copy=True)
    with keep_random_state(like.device):
        with _accepting(dataset):
            outputs = module(observations)
            _check_outputs(outputs, tuple(dataset.targets.shape))
        if not outputs.requires_grad:
            raise ValueError("module returns outputs that depend on no trainable parameter: one step cannot teach it")
        loss = nn.functional.mse_loss(outputs, dataset.targets.to(outputs, copy=True))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]


def _own_log_stds(module: nn.Module, dataset: DistilledDataset, name: str | None) -> list[Tensor]:
    """The module's own log standard deviations: the one named, or all that are recognised."""
    shapes = ([dataset.outputs], [1, dataset.outputs])
    if name is None:
        return [
            parameter
            for key, parameter in module.named_parameters()
            if dataset.log_std is not None
            and key.rpartition(".")[2] in LOG_STD_NAMES
            and list(parameter.shape) in shapes
        ]
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    if dataset.log_std is None:
        raise ValueError(f"log_std={name!r}: the dataset's actions are discrete and have none")
    if name not in found:
        raise ValueError(f"log_std={name!r}: the module has {', '.join(found)}")
    if list(found[name].shape) not in shapes:
        raise ValueError(f"log_std={name!r}: shape {list(found[name].shape)}, expected {shapes[0]} or {shapes[1]}")
    return [found[name]]


class _WrongOutputs(ValueError):
    """What a module returned, as opposed to an error of its own."""


def _check_outputs(outputs: Tensor, expected: tuple[int, ...]) -> None:
    if not isinstance(outputs, Tensor):
        raise _WrongOutputs(f"module returns a {type(outputs).__name__}, expected a tensor of shape {list(expected)}")
    if tuple(outputs.shape) != tuple(expected):
        raise _WrongOutputs(f"module returns shape {list(outputs.shape)}, expected {list(expected)}")


@contextlib.contextmanager
def _accepting(dataset: DistilledDataset) -> Iterator[None]:
    """Says what a module was given when it fails on it."""
    try:
        yield
    except _WrongOutputs:
        raise
    except Exception as error:  # somebody else's module may raise anything
        shape = [dataset.pairs, *dataset.learner_shape]
        raise ValueError(f"module does not accept observations of shape {shape}: {error}") from error


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Torch's random state, on the CPU and on one device, is afterwards as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _floating(module: nn.Module) -> Tensor:
    """A parameter that shows a module's device and dtype."""
    return next(parameter for parameter in module.parameters() if parameter.is_floating_point())
