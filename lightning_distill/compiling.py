"""Losses whose values and gradients come from one compiled graph: what an update of small networks costs is mostly the number of its operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .envs import ConfigError

Batch = dict[str, Tensor]
#: The critic's loss (None without a critic), the actor's (None unless it learns), and what is logged.
Losses = tuple[Tensor | None, Tensor | None, dict[str, Tensor]]


class CompiledLosses:
    """Losses of critic and actor, which share no parameter, as a function of a batch and of whether the actor learns.

    The forward and both backward passes are compiled together, because ``torch.compile`` cannot differentiate a compiled function twice.
    The losses that are returned carry gradients that are computed already; ``backward`` only hands them on.

    Args:
        losses: of a batch, and of whether the actor learns.
        actor, critic: their parameters.
    """

    def __init__(
        self, losses: Callable[[Batch, bool], Losses], actor: list[nn.Parameter], critic: list[nn.Parameter]
    ) -> None:
        import torch._dynamo  # takes a second, which nobody else should wait for

        torch._dynamo.config.trace_autograd_ops = True  # the step's own gradient
        torch._dynamo.config.optimize_ddp = False  # which would cut the graph where gradients are summed over processes
        self.losses, self.actor, self.critic = losses, actor, critic
        self.compiled = torch.compile(self._differentiated, fullgraph=True, dynamic=False, isolate_recompiles=True)

    def _differentiated(self, batch: Batch, learns: bool) -> tuple[Losses, tuple[Tensor, ...], tuple[Tensor, ...]]:
        critic_loss, actor_loss, found = self.losses(batch, learns)
        of_critic = () if critic_loss is None else torch.autograd.grad(critic_loss, self.critic)
        of_actor = () if actor_loss is None else torch.autograd.grad(actor_loss, self.actor, allow_unused=True)
        losses = (None if loss is None else loss.detach() for loss in (critic_loss, actor_loss))
        return (*losses, {name: tensor.detach() for name, tensor in found.items()}), of_critic, of_actor

    def __call__(self, batch: Batch, learns: bool) -> Losses:
        try:
            (critic_loss, actor_loss, found), of_critic, of_actor = self.compiled(batch, learns)
        except torch._dynamo.exc.TorchDynamoException as error:
            first, *others = str(error).strip().splitlines()
            reason = f"{first} {others[0]}" if first.endswith("raised:") and others else first
            raise ConfigError(f"model.compile=true: {reason}; allowed here is false") from error
        if critic_loss is not None:
            critic_loss = _Differentiated.apply(critic_loss, of_critic, *self.critic)
        if actor_loss is not None:
            actor_loss = _Differentiated.apply(actor_loss, of_actor, *self.actor)
        return critic_loss, actor_loss, found


class _Differentiated(torch.autograd.Function):
    """A loss as a function of parameters by which it was differentiated before."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if gradient is None else factor * gradient for gradient in ctx.gradients)
