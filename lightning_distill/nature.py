"""The Nature CNN (Mnih et al. 2015) cut in two: its first layers an encoder, the rest a learner drawn afresh.

| layer | name | output |
|---|---|---|
| convolution, 32 × 8×8, stride 4 | 0 | [32, 20, 20] |
| convolution, 64 × 4×4, stride 2 | 2 | [64, 9, 9] |
| convolution, 64 × 3×3, stride 1 | 4 | [64, 7, 7] |
| linear, 512 | 7 | [512] |
| linear, d | 9 | [d] |

ReLU after each but the last. The encoder of level l ∈ 0…4 is the first l layers, ReLU included; names are those of one
``nn.Sequential`` of the whole network, in an encoder's state dict as in a learner's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .class_paths import described
from .learners import MLP, LearnerFamily, Params
from .modules import ModuleFamily

FRAMES = (4, 84, 84)
LEVELS = 4
#: Names of the convolutions, of the hidden linear layer, and of the output layer.
CONVOLUTIONS, HIDDEN, OUTPUT = ("0", "2", "4"), "7", "9"
KERNELS, STRIDES = (8, 4, 3), (4, 2, 1)
#: Where, in the whole network's sequence of modules, what follows the encoder of each level begins.
CUTS = (0, 2, 4, 6, 9)
#: Height and width of what the encoder of levels 0 … 3 returns.
SIDES = (84, 20, 9, 7)
#: What a frame's bytes are divided by.
MAX_PIXEL = 255.0


def level_of(shape: Sequence[int]) -> int:
    """Encoder level after which features have this shape: [C, 84, 84] 0, … [C, 7, 7] 3, [F] 4.

    Raises:
        ValueError: no layer of the Nature CNN is fed that.
    """
    if len(shape) == 1:
        return LEVELS
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] not in SIDES:
        raise ValueError(
            f"the Nature CNN is fed {list(shape)}; allowed are frames [C, 84, 84], and what its layers return"
        )
    return SIDES.index(shape[1])


def scaled(frames: Tensor, mean: Tensor | None = None) -> Tensor:
    """Bytes [..., C, H, W], less a mean [C, H, W] if there is one, over 255, laid out as convolutions want them (channels last), in the
    precision they run in."""
    kind = frames.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    # Moved while they are bytes: half the time of a conversion that moves.
    flat = frames.reshape(-1, *frames.shape[-3:]).contiguous(memory_format=torch.channels_last)
    flat = flat.to(dtype, copy=True).div_(MAX_PIXEL)
    if mean is not None:
        # In the same layout, as another takes twice as long as all that is above.
        flat.sub_((mean / MAX_PIXEL).to(dtype).unsqueeze(0).contiguous(memory_format=torch.channels_last))
    return flat.view(frames.shape)


class Layers(nn.Sequential):
    """Layers of the Nature CNN, for inputs with any dimensions before those of one sample, [..., *sample].

    Args:
        layers: name → layer, in order.
        sample: number of dimensions of one input.
    """

    def __init__(self, layers: Mapping[str, nn.Module], sample: int) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.sample = sample

    def forward(self, inputs: Tensor) -> Tensor:
        leading = inputs.shape[: inputs.dim() - self.sample]
        flat = inputs.reshape(-1, *inputs.shape[inputs.dim() - self.sample :])
        if self.sample == 3:
            # CPUs and GPUs alike are up to twice as fast with channels last.
            flat = flat.contiguous(memory_format=torch.channels_last)
        outputs = super().forward(flat)
        return outputs.reshape(*leading, *outputs.shape[1:])


class OutputLayer(nn.Linear):
    """A linear layer in its own precision, whatever that of the layers before: rounded values would be others."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.to(self.weight.dtype))


def _hidden_layers(channels: Sequence[int], width: int) -> dict[str, nn.Module]:
    """All layers but the output, by name."""
    layers: dict[str, nn.Module] = {}
    for index, (fan_in, fan_out) in enumerate(zip(channels, channels[1:], strict=False)):
        layers[CONVOLUTIONS[index]] = nn.Conv2d(fan_in, fan_out, KERNELS[index], STRIDES[index])
        layers[str(2 * index + 1)] = nn.ReLU()
    layers["6"], layers[HIDDEN], layers["8"] = nn.Flatten(), nn.Linear(channels[-1] * SIDES[-1] ** 2, width), nn.ReLU()
    return layers


def _initialised(layers: Layers, output_gain: float) -> Layers:
    for name, layer in layers.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, output_gain if name == OUTPUT else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return layers.to(memory_format=torch.channels_last)


def make_encoder(level: int, channels: Sequence[int] = (4, 32, 64, 64), width: int = 512) -> nn.Module:
    """A freshly initialised encoder of a level: [..., 4, 84, 84] → [..., *features]; at level 0 the identity."""
    return _initialised(_first_layers(level, channels, width), math.sqrt(2)) if level else nn.Identity()


def _first_layers(level: int, channels: Sequence[int], width: int) -> Layers:
    return Layers(dict(list(_hidden_layers(channels, width).items())[: CUTS[level]]), 3)


def make_nature_critic(shape: Sequence[int]) -> Layers:
    """State value on an encoder's features [..., *shape]: the rest of the network with one output, [..., 1]."""
    level = level_of(shape)
    layers = list(_hidden_layers((4, 32, 64, 64), 512).items())[CUTS[level] :]
    width = shape[0] if level == LEVELS else 512
    return _initialised(Layers({**dict(layers), OUTPUT: OutputLayer(width, 1)}, len(shape)), 1.0)


def encoder_from(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The encoder of a state dict, frozen; an empty one is the identity.

    Raises:
        ValueError: the tensors are not those of the first layers of a Nature CNN.
    """
    if not tensors:
        return nn.Identity()
    names = (*CONVOLUTIONS, HIDDEN)[: max(1, len(tensors) // 2)]
    level = f"encoder of level {len(names)}"
    if set(tensors) != {f"{name}.{part}" for name in names for part in ("weight", "bias")}:
        raise ValueError(
            f"{level}: holds {', '.join(sorted(tensors))[:200]}; expected weight and bias of the first layers of the "
            f"Nature CNN, named {', '.join((*CONVOLUTIONS, HIDDEN))}"
        )
    weights = [tensors[f"{name}.weight"] for name in names]
    try:
        convolutions = weights[: len(CONVOLUTIONS)]
        channels = [FRAMES[0], *(weight.shape[0] for weight in convolutions)]
        with torch.device("meta"):  # nothing is drawn at random
            encoder = _first_layers(len(names), (channels + [64] * 3)[:4], weights[-1].shape[0])
        encoder.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{level}: not one of the Nature CNN ({' '.join(str(error).split())})") from None
    return encoder.to(memory_format=torch.channels_last).requires_grad_(False).eval()


class NatureCNN(LearnerFamily):
    """The Nature CNN, or what an encoder leaves of it: the shape a learner is fed says where it begins.

    Its parameters have the names of the module docstring's table, each [K, …] of a torch layer's weight or bias.

    Args:
        width: units of the hidden linear layer.
        channels: of the three convolutions.
        activation: between layers, as in :class:`lightning_distill.MLP`; encoders always have ReLU.
        init, gain, output_gain: as in :class:`lightning_distill.MLP`.
    """

    def __init__(
        self,
        width: int = 512,
        channels: tuple[int, int, int] = (32, 64, 64),
        activation: Literal["tanh", "relu", "gelu", "silu", "elu", "sin"] = "relu",
        init: Literal["orthogonal", "xavier", "kaiming", "default"] = "orthogonal",
        gain: float = math.sqrt(2),
        output_gain: float = 0.01,
    ) -> None:
        MLP(width, 1, activation, init)  # checks what both have in common
        if len(channels) != len(CONVOLUTIONS) or min(channels) < 1:
            raise ValueError(f"NatureCNN.channels={channels}: allowed are three integers ≥ 1")
        self.width, self.channels, self.activation = width, tuple(channels), activation
        self.init, self.gain, self.output_gain = init, gain, output_gain

    def draw(self, learners: int, observation_shape: Sequence[int], outputs: int, device: Any = "cpu") -> Params:
        level = level_of(observation_shape)
        fan_in, params = observation_shape[0], {}
        for name, fan_out, kernel in list(zip(CONVOLUTIONS, self.channels, KERNELS, strict=True))[level:]:
            weight, bias = self._initial(learners, fan_in * kernel**2, fan_out, self.gain, device)
            params[f"{name}.weight"] = weight.unflatten(2, (fan_in, kernel, kernel))
            params[f"{name}.bias"], fan_in = bias, fan_out
        if level < LEVELS:
            fan_in *= SIDES[-1] ** 2
            params[f"{HIDDEN}.weight"], params[f"{HIDDEN}.bias"] = self._initial(
                learners, fan_in, self.width, self.gain, device
            )
            fan_in = self.width
        weight, bias = self._initial(learners, fan_in, outputs, self.output_gain, device)
        return params | {f"{OUTPUT}.weight": weight, f"{OUTPUT}.bias": bias}

    def _initial(self, learners: int, fan_in: int, fan_out: int, gain: float, device: Any) -> tuple[Tensor, Tensor]:
        weight, bias = MLP.INITIALISERS[self.init](learners, fan_in, fan_out, gain, device)
        return weight.mT.contiguous(), bias.squeeze(1)

    def forward(self, params: Params, observations: Tensor) -> Tensor:
        features = self.features(params, observations)
        # Whatever precision the layers before ran in: rounded logits would be another policy.
        with torch.autocast(features.device.type, enabled=False):
            return _linear(params, OUTPUT, features.to(params[f"{OUTPUT}.weight"].dtype))

    def with_output_layer(self, params: Params, weight: Tensor, bias: Tensor) -> Params:
        return params | {f"{OUTPUT}.weight": weight.mT, f"{OUTPUT}.bias": bias.squeeze(1)}

    def features(self, params: Params, observations: Tensor) -> Tensor:
        activation, hidden = ACTIVATIONS[self.activation], observations
        learners = observations.shape[0]
        if hidden.dim() == 5:
            # One convolution in K groups: on CPUs faster than vmap or a loop over learners.
            hidden = hidden.transpose(0, 1).flatten(1, 2)
            for name, stride in zip(CONVOLUTIONS, STRIDES, strict=True):
                if f"{name}.weight" in params:
                    hidden = hidden.contiguous(memory_format=torch.channels_last)
                    weight, bias = params[f"{name}.weight"].flatten(0, 1), params[f"{name}.bias"].flatten()
                    hidden = activation(F.conv2d(hidden, weight, bias, stride, groups=learners))
            hidden = hidden.unflatten(1, (learners, -1)).transpose(0, 1).flatten(2)
        if f"{HIDDEN}.weight" in params:
            hidden = activation(_linear(params, HIDDEN, hidden))
        return hidden

    def describe(self) -> dict[str, Any]:
        names = ["width", "activation", "init"] + (["gain", "output_gain"] if self.init == "orthogonal" else [])
        arguments = {name: getattr(self, name) for name in names} | {"channels": list(self.channels)}
        return described(self, NatureCNN, arguments)


def _linear(params: Params, name: str, inputs: Tensor) -> Tensor:
    """[K, B, fan_in] → [K, B, fan_out] by K linear layers."""
    return torch.baddbmm(params[f"{name}.bias"].unsqueeze(1), inputs, params[f"{name}.weight"].mT)


class ResidualCNN(nn.Module):
    """A small residual network for frames or an encoder's features: no layer in common with the Nature CNN.

    Args:
        observation_shape: [C, H, W].
        outputs: d.
        channels: of its convolutions.
    """

    def __init__(self, observation_shape: Sequence[int], outputs: int, channels: int = 32) -> None:
        super().__init__()
        if len(observation_shape) != 3:
            raise ValueError(f"ResidualCNN: observations {list(observation_shape)}; allowed are [C, H, W]")
        # From 84×84 to about 10×10; features are small already.
        stride = max(1, round(observation_shape[1] / 20))
        self.stem = nn.Conv2d(observation_shape[0], channels, 2 * stride + 1, stride, stride)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.head = nn.LazyLinear(256)
        self.output = nn.Linear(256, outputs)
        for layer in (self.stem, *self.blocks):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self(torch.zeros(1, *observation_shape))  # gives the head its shape
        nn.init.orthogonal_(self.head.weight, math.sqrt(2))
        nn.init.orthogonal_(self.output.weight, 0.01)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, observations: Tensor) -> Tensor:
        hidden = F.relu(self.stem(observations))
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            hidden = hidden + second(F.relu(first(F.relu(hidden))))
        hidden = F.avg_pool2d(F.relu(hidden), 2)
        return self.output(F.relu(self.head(hidden.flatten(1))))


#: Families of learners for frames and encoders' features, by name.
FRAME_FAMILIES: dict[str, Callable[[], LearnerFamily]] = {
    "nature": NatureCNN,
    "nature_256": lambda: NatureCNN(width=256),
    "nature_1024": lambda: NatureCNN(width=1024),
    "nature_tanh": lambda: NatureCNN(activation="tanh"),
    "nature_default_init": lambda: NatureCNN(init="default"),
    "nature_xavier": lambda: NatureCNN(init="xavier"),
    "residual_cnn": lambda: ModuleFamily(ResidualCNN),
}
