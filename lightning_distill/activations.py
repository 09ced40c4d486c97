"""Activations by name; tanh as fast as the processor allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
