"""Learners that are no multi-layer perceptron, to hold out: each made by ``factory(observation_shape, outputs)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A residual network (He et al. 2016): x ← x + relu(W x + b), twice, after a linear embedding."""

    def __init__(self, observation_shape: Sequence[int], outputs: int, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(math.prod(observation_shape), width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.output = nn.Linear(width, outputs)

    def forward(self, observations: Tensor) -> Tensor:
        hidden = self.embed(observations.flatten(1))
        for block in self.blocks:
            hidden = hidden + torch.relu(block(hidden))
        return self.output(hidden)


class EntryAttention(nn.Module):
    """Self-attention over the entries of an observation (Vaswani et al. 2017): each number is a token.

    A token is an entry times a learned direction plus a learned position; after one layer of attention and a
    pointwise tanh layer the tokens stand side by side before the output layer.
    """

    def __init__(self, observation_shape: Sequence[int], outputs: int, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        entries = math.prod(observation_shape)
        self.direction = nn.Parameter(torch.randn(entries, width))
        self.position = nn.Parameter(torch.randn(entries, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.pointwise = nn.Linear(width, width)
        self.output = nn.Linear(entries * width, outputs)

    def forward(self, observations: Tensor) -> Tensor:
        tokens = observations.flatten(1).unsqueeze(-1) * self.direction + self.position
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.output(torch.tanh(self.pointwise(tokens)).flatten(1))
