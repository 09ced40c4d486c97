"""What is looked at before training begins: whatever cannot work is said in a line, not found out after hours."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import nn

from .envs import ConfigError, reason
from .learners import FIXED, UnfitLearner
from .step_rules import check_outputs
from .teaching import keep_random_state

if TYPE_CHECKING:
    from .rollout_module import RolloutModule

#: Others lose the gradients' size (16-mixed, scaled) or the dtype of what simulators return.
PRECISIONS = ("32-true", "bf16-mixed")


def check_trainer(trainer: L.Trainer, validated: Collection[str]) -> None:
    """Raise ``ConfigError`` for options of the Trainer that nothing here can be trained with.

    Args:
        trainer: its callbacks may choose checkpoints by what is logged.
        validated: names of what a validation logs, all that begin with ``val/``.
    """
    for callback in trainer.checkpoint_callbacks:
        monitor = getattr(callback, "monitor", None) or ""
        if monitor.startswith("val/") and monitor not in validated:
            raise ConfigError(f"checkpoint.monitor={monitor!r}: a validation logs {', '.join(validated)}")
    if trainer.precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={trainer.precision!r}: allowed are {', '.join(PRECISIONS)}")
    if trainer.max_steps != -1 and not trainer.fast_dev_run:  # which sets it itself
        # Lightning counts each optimiser's steps there, schedules count iterations.
        raise ConfigError(
            f"trainer.max_steps={trainer.max_steps}: allowed is -1; data.env_steps says how long a run is"
        )
    if trainer.check_val_every_n_epoch not in (None, 1):
        raise ConfigError(
            f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}: allowed is 1; one epoch is the whole run, "
            "trainer.val_check_interval says how often it is validated"
        )
    if trainer.overfit_batches or (trainer.limit_train_batches != 1.0 and not trainer.fast_dev_run):
        name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
        raise ConfigError(
            f"trainer.{name}={getattr(trainer, name)}: allowed is to leave it out; data.env_steps says how long a run is"
        )
    if trainer.val_check_interval == 0:
        raise ConfigError(
            "trainer.val_check_interval=0: allowed are shares of the run above 0, up to 1.0, and numbers of iterations; without validation: "
            "trainer.limit_val_batches=0"
        )
    if trainer.max_epochs != 1:
        raise ConfigError(
            f"trainer.max_epochs={trainer.max_epochs}: allowed is 1; one epoch is the whole run, data.env_steps says how long"
        )


def check_optimizers(module: RolloutModule, iterations: int) -> None:
    """Raise ``ConfigError`` unless optimisers can be made and take a step on copies of the parameters, where these are, with gradients
    of zero, and schedulers can be made of them."""

    def copied(param: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(param.detach().clone(), param.requires_grad)
        copy.grad = torch.zeros_like(copy) if copy.requires_grad else None
        return copy

    groups = [{"params": list(map(copied, group["params"]))} for group in module.actor_groups()]
    for name, params in (("optimizer", groups), ("critic_optimizer", list(map(copied, module.critic_params())))):
        if not params:  # neither critic nor encoder
            continue
        try:
            optimizer = getattr(module, name)(params)
            optimizer.step()
        except Exception as error:  # somebody else's optimiser may raise anything
            raise ConfigError(
                f"model.{name}: cannot be made for this module's parameters and take a step ({reason(error)}); allowed "
                "are optimisers of dense parameters of any shape, in groups, whose step takes no closure, as Adam, AdamW, RMSprop and SGD"
            ) from error
        try:
            module.scheduler(optimizer, iterations)
        except Exception as error:
            raise ConfigError(
                f"model.scheduler: cannot be made of an optimiser and a number of iterations, {iterations} "
                f"({reason(error)}); allowed are schedulers that can, as LinearAnneal and CosineAnnealingLR"
            ) from error


def check_family(module: RolloutModule) -> None:
    """Raise ``ConfigError`` unless learners of a module's family can be drawn, taught and run. Random state stays as it is."""
    try:
        with keep_random_state(module.device), torch.no_grad():
            module.draw()
            params = module.policy_params()
            for count in (2, 1):  # in an evaluation each acts on one observation
                inputs = torch.zeros(module.learners, count, *module.learner_shape, device=module.device)
                check_outputs(module.family.forward(params, inputs), (*inputs.shape[:2], module.spec.actions))
            if all(name.startswith(FIXED) for name in params):
                raise UnfitLearner("they have no trainable parameter")
    except Exception as error:  # somebody else's module may raise anything
        raise ConfigError(f"model.family: its learners cannot be drawn, taught and run ({reason(error)})") from error
