"""Step rules: how a learner takes its one step on the pairs. The dataset holds the numbers that each needs.

    sgd           θ₁ = θ₀ − η g                      g = ∇θ mean‖f_θ₀(x) − y‖², η learned (Wilhelm & Ventura 2025, section 3)
    line_search   η = α ⟨r, J g⟩ / ‖J g‖²            r = f_θ₀(x) − y, J g its derivative along g, α learned
    newton        W = φᵀ (φ φᵀ + λ tr(φ φᵀ)/n I)⁻¹ (y − ȳ),   f_θ₁(s) = ȳ + (φ(s) − φ̄) W,   λ learned
    projection    newton; h₁ = h₀ − κ ‖h₀‖ Q/‖Q‖ of all other layers h, Q = U Vᵀ for g = U Σ Vᵀ; newton again;   λ learned

With α = 1 a line search goes to the minimum of the linearised loss along the gradient (Cauchy 1847), so a step is equally
long for narrow and wide learners. ``newton`` is one Newton step of the last layer's weights and bias on the same loss with
weight decay λ tr(φ φᵀ)/n ‖W‖²; that loss is quadratic, so one step is exact and forgets the initial weights (ridge
regression, Hoerl & Kennard 1970). φ are the features that enter the last layer, centred by their mean φ̄ over the pairs.
``projection`` is one step of all layers but the last on the loss that is left when the last is always at its best (variable
projection, Golub & Pereyra 1973), of a length relative to their own: features turn towards what the pairs ask for. Of one
gradient step, nearly all goes into a direction or two (Ba et al. 2022); steepest descent in the spectral norm (Carlson et al.
2015; Muon, Jordan et al. 2024) goes along the gradient's polar factor Q, which moves all directions of a matrix alike.
Narrow relu learners want long steps, deep ones short ones, hence each its κ.

All are differentiable in pairs and numbers, and take K stacked learners at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

from .learners import FIXED, Learners, Params, UnfitLearner

Step = Callable[..., Params]

#: Step lengths κ that ``projection`` tries, one after another, relative to what moves.
LENGTHS = (1 / 32, 1 / 4, 2.0)


@dataclass(frozen=True)
class StepRule:
    """A step and the names of its numbers.

    Attributes:
        step: (learners of one architecture, params, observations, targets, *numbers) → params of the taught learners.
        numbers: what it needs beside the pairs: fields of ``DistilledDataset`` and tensors of the file, positive scalars.
    """

    step: Step
    numbers: tuple[str, ...]

    def __call__(
        self, learners: Learners, params: Params, observations: Tensor, targets: Tensor, *numbers: Tensor
    ) -> Params:
        """Parameters of K taught learners.

        Args:
            learners: what runs them.
            params: of the fresh learners, each [K, …]; those marked ``FIXED`` are returned as they are.
            observations: [n, *obs].
            targets: [n, d].
            numbers: scalars.

        Raises:
            UnfitLearner: the rule cannot teach these learners, or they return another number of outputs.
        """
        return learners.map(lambda part, its: self.step(part, its, observations, targets, *numbers), params)


def sgd(learners: Learners, params: Params, observations: Tensor, targets: Tensor, learning_rate: Tensor) -> Params:
    """One plain SGD step on the mean squared error over pairs and dimensions, of size η."""
    gradients = _gradients(learners, params, observations, targets)
    return params | {name: params[name] - learning_rate * gradient for name, gradient in gradients.items()}


def line_search(learners: Learners, params: Params, observations: Tensor, targets: Tensor, scale: Tensor) -> Params:
    """One SGD step of α times the size that minimises the linearised loss along the gradient, for each learner."""
    gradients = _gradients(learners, params, observations, targets)
    steps = scale * _best_steps(learners, params, observations, targets, gradients)
    return params | {name: params[name] - _each(steps, gradient) * gradient for name, gradient in gradients.items()}


def _in_full_precision(step: Step) -> Step:
    """The step without autocast: a system rounded to half precision is another one, and polar factors lift what is rounded."""

    @wraps(step)
    def exact(learners: Learners, params: Params, observations: Tensor, *others: Tensor) -> Params:
        dtype = next((value.dtype for value in params.values() if value.is_floating_point()), observations.dtype)
        with torch.autocast(observations.device.type, enabled=False):
            return step(learners, params, observations.to(dtype), *others)

    return exact


@_in_full_precision
def newton(learners: Learners, params: Params, observations: Tensor, targets: Tensor, ridge: Tensor) -> Params:
    """One damped Newton step of the last layer, on features centred over the pairs; other layers stay as they are."""
    features = learners.features(params, observations.expand(_learners(params), *observations.shape))
    features, targets, ridge = wide(features), wide(targets), wide(ridge)
    mean, target_mean = features.mean(1, keepdim=True), targets.mean(0)
    centred = features - mean
    # Of the two equal forms the one with the smaller system: pairs × pairs or features × features.
    dual = centred.shape[1] <= centred.shape[2]
    gram = centred @ centred.mT if dual else centred.mT @ centred
    # Features that are all alike teach nothing: W = 0. (Targets over a number near the smallest there is would be infinite.)
    damping = ridge * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / centred.shape[1]
    damping = damping.clamp(min=1e-30)
    gram = gram + torch.diag_embed(damping.expand(gram.shape[:-1]))
    wanted = (targets - target_mean).expand(len(gram), *targets.shape)
    weight = centred.mT @ _solved(gram, wanted) if dual else _solved(gram, centred.mT @ wanted)
    return learners.with_output_layer(params, weight, target_mean - mean @ weight)


@_in_full_precision
def projection(learners: Learners, params: Params, observations: Tensor, targets: Tensor, ridge: Tensor) -> Params:
    """One step of all layers but the last along their gradients' polar factors, before and after which the last is where
    ``newton`` puts it.

    Each learner's step is lengthened until its loss rises (forward tracking). Not the least loss of all: far beyond the first
    minimum attention fits few pairs again, by features that know nothing else.
    """
    solved = newton(learners, params, observations, targets, ridge)
    others = [name for name in _trainable(params) if solved[name] is params[name]]
    gradients = _gradients(learners, solved, observations, targets, others)
    if not gradients:  # a linear learner has no other layer
        return solved
    directions = {name: _polar_factor(gradient) for name, gradient in gradients.items()}
    sizes = {name: _size(params[name]) for name in gradients}

    def after(length: Tensor) -> Params:
        moved = {name: params[name] - _each(length * sizes[name], along) * along for name, along in directions.items()}
        return newton(learners, params | moved, observations, targets, ridge)

    lengths = ridge.new_tensor(LENGTHS)
    with torch.no_grad():
        losses = torch.stack([_losses(learners, after(length), observations, targets) for length in lengths])
        losses = losses.nan_to_num(nan=torch.inf)
        rises = torch.cat([losses[1:] >= losses[:-1], torch.ones_like(losses[:1], dtype=torch.bool)])
    return after(lengths[rises.int().argmax(0)])


#: In the order of how little they ask of a learner; the first is the plain step.
STEP_RULES = {
    "sgd": StepRule(sgd, ("learning_rate",)),
    "line_search": StepRule(line_search, ("line_search_scale",)),
    "newton": StepRule(newton, ("newton_ridge",)),
    "projection": StepRule(projection, ("newton_ridge",)),
}


def best_steps(learners: Learners, params: Params, observations: Tensor, targets: Tensor) -> Tensor:
    """Step size [K] of each learner that minimises the linearised loss along its gradient: ``line_search`` with α = 1."""
    found: list[Tensor] = []

    def collect(part: Learners, its: Params) -> Params:
        gradients = _gradients(part, its, observations, targets)
        found.append(_best_steps(part, its, observations, targets, gradients))
        return its

    learners.map(collect, params)
    return torch.cat(found)


def check_outputs(outputs: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ``UnfitLearner`` unless outputs [K, n, d] have the shape that is expected; of one learner it names [n, d]."""
    shown = list(expected[expected[0] == 1 :])
    if not isinstance(outputs, Tensor):
        raise UnfitLearner(f"module returns a {type(outputs).__name__}, expected a tensor of shape {shown}")
    if tuple(outputs.shape) != tuple(expected):
        raise UnfitLearner(f"module returns shape {list(outputs.shape[expected[0] == 1 :])}, expected {shown}")


def _learners(params: Params) -> int:
    return len(next(iter(params.values())))


def _trainable(params: Params) -> Params:
    return {name: value for name, value in params.items() if not name.startswith(FIXED)}


def _solved(systems: Tensor, wanted: Tensor) -> Tensor:
    """x [K, n, d] with systems [K, n, n] x = wanted.

    On a CPU one after the other: there torch 2.13 (oneMKL 2024.2), by more than one thread, fails to solve several of 256 rows or more at
    once, and solves some of 192 wrongly, without a word.
    """
    if systems.device.type != "cpu":
        return torch.linalg.solve(systems, wanted)
    return torch.stack([torch.linalg.solve(*each) for each in zip(systems, wanted, strict=True)])


def wide(value: Tensor) -> Tensor:
    """In single precision at least: linear algebra knows no half."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _size(parameter: Tensor) -> Tensor:
    """Norm [K] of a parameter [K, …] that is a matrix; of a vector √entries, that of ones, since biases begin at 0."""
    matrices = wide(_as_matrices(parameter))
    if 1 in matrices.shape[1:]:
        return matrices.new_full((len(matrices),), math.sqrt(matrices[0].numel()))
    return torch.linalg.matrix_norm(matrices)


def _polar_factor(gradient: Tensor) -> Tensor:
    """Of gradients [K, …], as matrices G = U Σ Vᵀ, about U Vᵀ, with a Frobenius norm of 1; of a vector its direction.

    Five iterations in the manner of Newton and Schulz, with the coefficients of Muon (Jordan et al. 2024), which bring singular
    values from 0.003 of ‖G‖ up to between 0.7 and 1.2: products of matrices alone, so that derivatives exist for equal ones too.
    """
    matrices = wide(_as_matrices(gradient))
    tall = matrices.shape[1] > matrices.shape[2]
    found = _unit(matrices.mT if tall else matrices)
    for _ in range(5):
        square = found @ found.mT
        found = 3.4445 * found + (-4.7750 * square + 2.0315 * square @ square) @ found
    return _unit(found.mT if tall else found).reshape(gradient.shape)


def _as_matrices(values: Tensor) -> Tensor:
    """Values [K, …] of K learners as matrices [K, r, c]; a convolution's as one row for each channel, a vector or a number as a row."""
    return values.flatten(2) if values.dim() > 2 else values.reshape(len(values), 1, -1)


def _unit(matrices: Tensor) -> Tensor:
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    # A zero matrix stays zero; over a norm clamped to a tiny number its derivative would not be finite.
    return matrices / torch.where(norms > 0, norms, 1.0)


def _each(sizes: Tensor, gradient: Tensor) -> Tensor:
    """Sizes [K] for a gradient [K, …]."""
    return sizes.view(-1, *[1] * (gradient.dim() - 1)).to(gradient)


def _losses(learners: Learners, params: Params, observations: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error [K] over pairs and dimensions."""
    outputs = learners.forward(params, observations.expand(_learners(params), *observations.shape))
    check_outputs(outputs, (_learners(params), *targets.shape))
    return (outputs - targets).square().flatten(1).mean(1)


def _gradients(
    learners: Learners, params: Params, observations: Tensor, targets: Tensor, names: Iterable[str] | None = None
) -> Params:
    """Gradient of each learner's own loss, for those of the trainable parameters (or of ``names``) that it depends on."""
    trainable = _trainable(params) if names is None else {name: params[name] for name in names}
    if not trainable:
        return {}

    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # θ₀ is a constant: derivatives of the gradient end at the pairs. (``torch.func.grad`` takes twice as long, and
        # fewer modules.)
        leaves = {name: value.detach().requires_grad_() for name, value in trainable.items()}
        # Learners share nothing, so the gradient of the sum holds every learner's own gradient.
        total = _losses(learners, params | leaves, observations, targets).sum()
        if not total.requires_grad:
            raise UnfitLearner("module returns outputs that depend on no trainable parameter: one step cannot teach it")
        gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=differentiable, allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _best_steps(learners: Learners, params: Params, observations: Tensor, targets: Tensor, gradients: Params) -> Tensor:
    def outputs(trainable: Params) -> Tensor:
        return learners.forward(params | trainable, observations.expand(_learners(params), *observations.shape))

    # J g by reverse mode twice, as fewer modules know forward mode: v ↦ Jᵀ v is linear, and its transpose is J.
    found, transpose = torch.func.vjp(outputs, {name: params[name] for name in gradients})
    (change,) = torch.func.vjp(transpose, torch.zeros_like(found))[1]((gradients,))
    along, curvature = ((found - targets) * change).flatten(1).sum(1), change.square().flatten(1).sum(1)
    return along / curvature.clamp(min=torch.finfo(curvature.dtype).tiny)
