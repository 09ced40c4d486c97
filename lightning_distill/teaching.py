"""The one step, applied to anybody's modules: ``teach`` one or ``teach_many``, by a step rule, and get policies.

The rules themselves, differentiable and for K stacked learners, are in ``step_rules.py``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from .dataset import DistilledDataset, as_dataset, normalise
from .families import as_family
from .learners import FIXED, LearnerFamily, Learners, Params, UnfitLearner, count_learners
from .modules import Forward, ModuleFamily, StackedModules, stack_parameters
from .nature import CONVOLUTIONS, HIDDEN
from .step_rules import STEP_RULES, StepRule, best_steps, wide

#: Pairs on which modules are compared before they are stacked.
CHECKED = 8
#: Upper bound on learners × pairs that modules are taught on in one call, to bound memory.
AT_ONCE = 512
LOG_STD_NAMES = ("log_std", "logstd")


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
            ValueError: the observation has another shape, or holds a NaN. (An infinite one is clipped.)
        """
        mean = self.observation_mean
        if not isinstance(observation, Tensor):
            given = torch.from_numpy(np.array(observation, dtype=np.float32, order="C"))
        else:
            given = observation
        batch, single = self._as_batch(given.to(mean.device, mean.dtype))
        output = self.output(batch)
        if output.isnan().any():  # the largest of such logits would be an action like any other
            raise ValueError("observation: holds NaN, allowed are numbers")
        action = self._sampled(output, generator) if sample else self._greedy(output)
        action = action.squeeze(len(self.leading)) if single else action
        # [()] makes a scalar of an array without dimensions, as environments expect.
        return action if isinstance(observation, Tensor) else action.cpu().numpy()[()]

    def output(self, observations: Tensor) -> Tensor:
        """Action logits or means [*leading, B, d] for observations [*leading, B, *obs] in the environment's units."""
        return self.module(self.normalised(observations).to(_floating(self.module).dtype)).float()

    def normalised(self, observations: Tensor) -> Tensor:
        """Observations in the environment's units as the module is fed them: normalised, and encoded."""
        return self.encoder(normalise(observations, self.observation_mean, self.observation_std, self.observation_clip))

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
        return count_learners(self.module.params)

    @property
    def leading(self) -> tuple[int, ...]:
        return (self.learners,)


class StackedLearners(nn.Module):
    """K stacked learners as one module from observations [K, B, *obs] to outputs [K, B, d]."""

    def __init__(self, forward: Forward, params: Params) -> None:
        super().__init__()
        self.run = forward
        self.stacked = nn.ParameterDict(
            {  # a name in a module cannot hold a dot, or be one that the module has for itself
                "/" + name.replace("~", "~0").replace("/", "~1").replace(".", "/"): nn.Parameter(
                    value.detach(), requires_grad=not name.startswith(FIXED)
                )
                for name, value in params.items()
            }
        )

    @property
    def params(self) -> Params:
        return {
            name[1:].replace("/", ".").replace("~1", "/").replace("~0", "~"): value
            for name, value in self.stacked.items()
        }

    def forward(self, observations: Tensor) -> Tensor:
        return self.run(self.params, observations)


def teach(
    module: nn.Module,
    dataset: DistilledDataset | str | os.PathLike[str],
    step_rule: str | None = None,
    *,
    in_place: bool = False,
    log_std: str | None = None,
) -> Policy:
    """Teach one module by one step on the dataset and return it as a policy.

    The module is taught, and acts, in evaluation mode: dropout is off and batch normalisation uses its running
    statistics, so that the function that is taught is the one that acts. Only parameters with ``requires_grad`` move;
    shared ones move once. Neither random state nor ``.grad`` changes.

    Args:
        module: maps normalised observations [B, *obs], or the features of the dataset's encoder ([B,
            *dataset.learner_shape]), to logits or action means [B, d]; any architecture, on any one device, of any
            floating dtype.
        dataset: from :func:`lightning_distill.load`, or what that is given: a name in the zoo or a path.
        step_rule: ``sgd``, ``line_search``, ``newton`` or ``projection``, if the dataset has the numbers that it needs;
            default: the one that the dataset recommends.
        in_place: change the caller's module, and leave it in evaluation mode; by default a copy is taught.
        log_std: name of the module's own log standard deviation, [d] or [1, d], which is set to the dataset's after the
            step (continuous only). By default parameters of these shapes called ``log_std`` or ``logstd`` are.

    Raises:
        ValueError: the module does not take the dataset's observations, does not return its number of outputs, or has
            nothing to teach; or the dataset does not go with the step rule, or the module does not (``UnfitLearner``).
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: is a {type(module).__name__}, expected an nn.Module")
    module = _uncompiled(module)
    dataset = as_dataset(dataset)
    rule, numbers = chosen_rule(dataset, step_rule)
    # Autograd needs ordinary tensors, which a surrounding inference mode would not give.
    with torch.inference_mode(False), torch.enable_grad():
        taught = module if in_place else _copied(module)
        modes = [(part, part.training) for part in taught.modules()]
        try:
            own_log_stds = _own_log_stds(taught, dataset, log_std)
            with torch.no_grad():
                params = stack_parameters([taught])
                stepped = _step(rule, numbers, StackedModules(taught), params, dataset)
        except BaseException:
            for part, training in modes:
                part.training = training
            raise
        with torch.no_grad():
            for name, parameter in taught.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(stepped[name][0])
            for parameter in own_log_stds:
                parameter.copy_(dataset.log_std.view(parameter.shape))
        return Policy(taught, dataset.to(_floating(taught).device)).eval()


def teach_many(
    family: LearnerFamily | Callable[..., nn.Module] | str | Sequence[nn.Module],
    dataset: DistilledDataset | str | os.PathLike[str],
    learners: int | None = None,
    step_rule: str | None = None,
    *,
    device: torch.device | str = "cpu",
) -> StackedPolicy:
    """Teach K learners at once, each by one step on the dataset, and return them as one stacked policy.

    Args:
        family: what learners are drawn from, by torch's global random state (or its name, or what makes a module from
            ``(observation_shape, outputs)``); or K modules of one architecture, which are copied and taught in evaluation mode.
        dataset: as in :func:`teach`.
        learners: K, learners to draw; for a family only.
        step_rule: as in :func:`teach`.
        device: where a family is drawn and taught; modules stay where they are.

    Raises:
        ValueError: as :func:`teach`; or the modules differ in architecture, or in what is neither parameter nor buffer.
    """
    dataset = as_dataset(dataset)
    rule, numbers = chosen_rule(dataset, step_rule)
    if isinstance(family, nn.Module) and not isinstance(family, nn.ModuleList):
        raise ValueError(
            f"family: one {type(family).__name__}, which teach(module, dataset) teaches; allowed is a list of modules"
        )
    if isinstance(family, str) or not isinstance(family, Sequence | nn.ModuleList):
        family = as_family(family)
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(family, LearnerFamily):
            if not isinstance(learners, Integral) or learners < 1:
                raise ValueError(f"learners={learners!r}: how many to draw of the family, an integer ≥ 1")
            params = family.draw(learners, dataset.learner_shape, dataset.outputs, device)
            stack: Learners = family
        else:
            if learners is not None or not family:
                raise ValueError(f"learners={learners} with {len(family)} modules: allowed is None with 1 or more")
            family = [_uncompiled(module) for module in family]
            params = stack_parameters(family)
            stack = StackedModules(_copied(family[0]))
            with _accepting(dataset), keep_random_state(_like(params).device):
                stack.check(family, params, dataset.learner_inputs()[:CHECKED].to(_like(params)))
        taught = _step(rule, numbers, stack, params, dataset)
        return StackedPolicy(stack.forward, taught, dataset.to(_like(params).device)).eval()


def with_line_search(dataset: DistilledDataset, family: LearnerFamily, learners: int = 64) -> DistilledDataset:
    """The dataset with the α by which ``line_search`` takes steps as long, on average, as its plain step.

    α = η over the geometric mean of the best steps of fresh learners of the family that it was distilled with. Returned
    as it is if it has an α; torch's random state is left as it was.
    """
    if dataset.line_search_scale is not None:
        return dataset
    scale = dataset.learning_rate / _mean_best_step(dataset, family, learners)
    return dataclasses.replace(dataset, line_search_scale=scale)


def with_plain_step(dataset: DistilledDataset, family: LearnerFamily, learners: int = 64) -> DistilledDataset:
    """The dataset with the η that is the best plain step, on average, of fresh learners of a family; times its α, if any.

    For datasets distilled by another rule: what the plain step then does is worth a row in every table.
    """
    step = _mean_best_step(dataset, family, learners)
    return dataclasses.replace(dataset, learning_rate=step * (dataset.line_search_scale or 1.0))


def with_encoder_level(dataset: DistilledDataset, level: int, family: LearnerFamily) -> DistilledDataset:
    """The dataset with no more than the first layers of its encoder, for learners that are all that follows.

    Its η becomes such that their steps, compared with the best ones, are as long as before.

    Raises:
        ValueError: the pairs are an encoder's features, which other learners are not fed; or it has fewer layers.
    """
    if level > dataset.encoder_level or (dataset.encoded and level < dataset.encoder_level):
        raise ValueError(
            f"encoder level {level}: allowed are levels up to the dataset's {dataset.encoder_level}, with frames as pairs"
        )
    if level == dataset.encoder_level:
        return dataset
    kept = [f"{name}.{part}" for name in (*CONVOLUTIONS, HIDDEN)[:level] for part in ("weight", "bias")]
    cut = dataclasses.replace(
        with_line_search(dataset, family),
        encoder={name: dataset.encoder[name] for name in kept},
        metadata={**dataset.metadata, "encoder_level": str(level)},
    )
    return with_plain_step(cut, family)


def _mean_best_step(dataset: DistilledDataset, family: LearnerFamily, learners: int) -> Tensor:
    device = dataset.observations.device
    exactly = torch.autocast(device.type, enabled=False)  # also where a run that has another precision asks
    with torch.inference_mode(False), torch.no_grad(), seeded(0, device), exactly:
        params = family.draw(learners, dataset.learner_shape, dataset.outputs, device)
        steps = best_steps(family, params, dataset.learner_inputs().clone(), dataset.targets.clone())
        return steps.clamp(min=torch.finfo(steps.dtype).tiny).log().mean().exp()


def _uncompiled(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given, which has the same parameters: of what was compiled no layer's input can be seen."""
    return getattr(module, "_orig_mod", module)


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # somebody else's module may hold anything
        raise ValueError(f"module cannot be copied ({error}); in_place=True of teach() teaches it itself") from error


def chosen_rule(dataset: DistilledDataset, name: str | None) -> tuple[StepRule, list[Tensor]]:
    """The rule of that name, by default the dataset's, and its numbers in the dataset.

    Raises:
        ValueError: there is no such rule, or the dataset lacks numbers that it needs.
    """
    name = name or dataset.step_rule
    missing = {known: [n for n in rule.numbers if getattr(dataset, n) is None] for known, rule in STEP_RULES.items()}
    usable = ", ".join(known for known, lacking in missing.items() if not lacking)
    if name not in STEP_RULES:
        raise ValueError(
            f"step_rule={name!r}: allowed are {', '.join(STEP_RULES)}; this dataset has the numbers of {usable}"
        )
    if missing[name]:
        raise ValueError(f"step_rule={name!r}: the dataset has no {', '.join(missing[name])}; allowed are {usable}")
    return STEP_RULES[name], [getattr(dataset, number) for number in STEP_RULES[name].numbers]


def _step(
    rule: StepRule, numbers: list[Tensor], learners: Learners, params: Params, dataset: DistilledDataset
) -> Params:
    """Parameters of the taught learners, in their precision; torch's random state is left as it was.

    The step itself is taken in single precision at least: rounded to half, what one number of a sum adds is lost. Modules take it in
    portions: the step's graph holds what each of them computes.
    """
    fresh = {name: wide(value) for name, value in params.items()}
    like = _like(fresh)
    # Copies: of a tensor made in inference mode nothing can be differentiated.
    given = [tensor.to(like, copy=True) for tensor in (dataset.learner_inputs(), dataset.targets, *numbers)]
    with _accepting(dataset), keep_random_state(like.device):
        by_module = isinstance(learners, StackedModules | ModuleFamily)
        together = max(1, AT_ONCE // dataset.pairs) if by_module else count_learners(params)
        parts = zip(*(value.split(together) for value in fresh.values()), strict=True)
        taught = [rule(learners, dict(zip(fresh, part, strict=True)), *given) for part in parts]
    return {name: torch.cat([part[name] for part in taught]).to(value.dtype) for name, value in params.items()}


def _like(params: Params) -> Tensor:
    """A trainable parameter, which shows device and dtype."""
    like = next((value for name, value in params.items() if not name.startswith(FIXED)), None)
    if like is None:
        raise UnfitLearner("learners have no trainable parameter: one step cannot teach them")
    return like


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


@contextlib.contextmanager
def _accepting(dataset: DistilledDataset) -> Iterator[None]:
    """Says what a module was given when it fails on it."""
    try:
        yield
    except UnfitLearner:
        raise
    except Exception as error:  # somebody else's module may raise anything
        shape = [dataset.pairs, *dataset.learner_shape]
        raise ValueError(f"module does not accept observations of shape {shape}: {error}") from error


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Torch's random state, on the CPU and on one device, is afterwards as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Random numbers on the CPU and on one device follow from a seed; what comes afterwards is what would have come without, on all devices."""
    device = torch.device(device)
    with keep_random_state(device):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU, of which one is restored
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def _floating(module: nn.Module) -> Tensor:
    """A parameter that shows a module's device and dtype."""
    return next(parameter for parameter in module.parameters() if parameter.is_floating_point())
