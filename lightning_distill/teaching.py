"""The one step: θ₁ = θ₀ − η ∇θ mean‖f_θ₀(x) − y‖² (Wilhelm & Ventura 2025, section 3).

``sgd_step`` teaches K stacked learners at once and is differentiable in observations, targets and learning rate;
``teach`` applies the same step to anybody's module.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .dataset import DistilledDataset
    from .learners import Forward, Params


def sgd_step(forward: Forward, params: Params, observations: Tensor, targets: Tensor, learning_rate: Tensor) -> Params:
    """Parameters of K learners after one plain SGD step on the mean squared error over pairs and dimensions.

    Args:
        forward: (params, observations [K, n, *obs]) → outputs [K, n, d].
        params: of the fresh learners, each [K, …].
        observations: [n, *obs], targets: [n, d], learning_rate: scalar η.
    """

    def loss(params: Params) -> Tensor:
        learners = next(iter(params.values())).shape[0]
        outputs = forward(params, observations.expand(learners, *observations.shape))
        # Learners share nothing, so the gradient of the sum holds every learner's own gradient.
        return (outputs - targets).square().flatten(1).mean(1).sum()

    gradients = torch.func.grad(loss)(params)
    return {name: value - learning_rate * gradients[name] for name, value in params.items()}


class Policy(nn.Module):
    """A taught module that acts: normalises an observation, runs the module, returns an action.

    Args:
        module: the taught module, fed normalised observations.
        dataset: supplies the normaliser, the kind of action and the log standard deviation.
    """

    def __init__(self, module: nn.Module, dataset: DistilledDataset) -> None:
        super().__init__()
        self.module, self.action_type = module, dataset.action_type
        self.observation_clip = dataset.observation_clip
        self.register_buffer("observation_mean", dataset.observation_mean.clone())
        self.register_buffer("observation_std", dataset.observation_std.clone())
        self.register_buffer("log_std", None if dataset.log_std is None else dataset.log_std.clone())

    @torch.no_grad()
    def forward(self, observation: np.ndarray | Tensor, sample: bool = False) -> np.ndarray | Tensor:
        """Action for one observation [*obs] or a batch [B, *obs], in the type that came in.

        Greedy by default (largest logit, or the mean); ``sample=True`` draws from the policy's distribution.
        Continuous actions are in the environment's units and not yet clipped to its bounds.
        """
        given = torch.as_tensor(observation, dtype=torch.float32, device=self.observation_mean.device)
        batched = given.dim() > self.observation_mean.dim()
        batch = given if batched else given.unsqueeze(0)
        clip = self.observation_clip
        output = self.module(((batch - self.observation_mean) / self.observation_std).clamp(-clip, clip))
        if self.action_type == "discrete":
            action = torch.distributions.Categorical(logits=output).sample() if sample else output.argmax(-1)
        else:
            action = output + self.log_std.exp() * torch.randn_like(output) if sample else output
        action = action if batched else action[0]
        return action if isinstance(observation, Tensor) else action.cpu().numpy()


def teach(module: nn.Module, dataset: DistilledDataset, *, in_place: bool = False) -> Policy:
    """Teach one module by one SGD step on the dataset and return it as a policy.

    Args:
        module: maps normalised observations [B, *obs] to logits or action means [B, d]; any architecture.
        dataset: from :func:`lightning_distill.load`.
        in_place: also change the caller's module; by default a copy is taught.

    Raises:
        ValueError: the module does not take the dataset's observations or does not return its number of outputs.
    """
    taught = module if in_place else copy.deepcopy(module)
    parameters = [parameter for parameter in taught.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("module has no trainable parameter: one step cannot teach it")
    device = parameters[0].device
    dataset = dataset.to(device)
    with torch.enable_grad():
        try:
            outputs = taught(dataset.observations)
        except RuntimeError as error:
            shape = ["B", *dataset.observation_shape]
            raise ValueError(f"module does not accept observations {shape}: {error}") from error
        if outputs.shape != dataset.targets.shape:
            raise ValueError(f"module returns {tuple(outputs.shape)}; expected {tuple(dataset.targets.shape)}")
        loss = torch.nn.functional.mse_loss(outputs, dataset.targets)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= dataset.learning_rate * gradient
    return Policy(taught, dataset).to(device)
