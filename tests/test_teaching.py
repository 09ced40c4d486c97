"""The one step: against a step unrolled by hand, and for whatever module a user brings."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import threading
from functools import partial

import numpy as np
import pytest
import torch
from handmade import make_dataset
from torch import Tensor, nn

from lightning_distill import MLP, ModuleFamily, load, teach, teach_many
from lightning_distill.activations import tanh
from lightning_distill.learners import FIXED
from lightning_distill.step_rules import STEP_RULES, sgd

# --- the step --------------------------------------------------------------------------------------------------------


def double_problem(learners: int = 3, pairs: int = 5, width: int = 4):
    """A small family with its learners, and pairs, all float64."""
    torch.manual_seed(0)
    family = MLP(width=width, depth=2, init="default")
    params = {name: value.double() for name, value in family.draw(learners, (3,), 2).items()}
    observations, targets = (torch.randn(pairs, d, dtype=torch.float64, requires_grad=True) for d in (3, 2))
    learning_rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return family, params, observations, targets, learning_rate


def test_the_step_is_the_one_written_out_by_hand():
    """Back-propagation of mean‖f(x) − y‖² through two tanh layers and a linear one, in numpy, learner by learner."""
    family, params, observations, targets, learning_rate = double_problem()
    taught = sgd(family, params, observations, targets, learning_rate)
    x, y = observations.detach().numpy(), targets.detach().numpy()
    for k in range(3):
        (w0, b0), (w1, b1), (w2, b2) = (
            (params[f"{layer}.weight"][k].numpy(), params[f"{layer}.bias"][k].numpy()) for layer in range(3)
        )
        h0 = np.tanh(x @ w0 + b0)
        h1 = np.tanh(h0 @ w1 + b1)
        error2 = 2 * (h1 @ w2 + b2 - y) / y.size
        error1 = (error2 @ w2.T) * (1 - h1**2)
        error0 = (error1 @ w1.T) * (1 - h0**2)
        for layer, (inputs, error) in enumerate(((x, error0), (h0, error1), (h1, error2))):
            weight, bias = (params[f"{layer}.{name}"][k].numpy() for name in ("weight", "bias"))
            for name, expected in (
                ("weight", weight - 0.7 * inputs.T @ error),
                ("bias", bias - 0.7 * error.sum(0, keepdims=True)),
            ):
                np.testing.assert_allclose(taught[f"{layer}.{name}"][k].detach().numpy(), expected, atol=1e-10, rtol=0)


def test_the_step_is_differentiable_in_observations_targets_and_learning_rate():
    family, params, *inputs = double_problem(learners=2, pairs=3)
    probe = torch.randn(2, 4, 3, dtype=torch.float64)

    def outputs_after(observations: Tensor, targets: Tensor, learning_rate: Tensor) -> Tensor:
        return family.forward(sgd(family, params, observations, targets, learning_rate), probe)

    assert torch.autograd.gradcheck(outputs_after, inputs)


def mlp_module(observation_shape=(17,), outputs=6) -> nn.Sequential:
    sizes = [observation_shape[0], 64, 64]
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, outputs))


def as_mlp(modules: list[nn.Sequential]) -> dict[str, Tensor]:
    """The weights of ``mlp_module``s as parameters of the family ``MLP``."""
    layers = [[layer for layer in module if isinstance(layer, nn.Linear)] for module in modules]
    params = {}
    for index in range(3):
        params[f"{index}.weight"] = torch.stack([linear[index].weight.detach().mT for linear in layers])
        params[f"{index}.bias"] = torch.stack([linear[index].bias.detach().unsqueeze(0) for linear in layers])
    return params


def test_families_modules_and_stacks_of_them_are_taught_alike():
    torch.manual_seed(0)
    dataset, modules, family = make_dataset(), [mlp_module() for _ in range(3)], MLP()
    observation = torch.randn(3, 7, 17)
    one_by_one = torch.stack([teach(m, dataset)(o) for m, o in zip(modules, observation, strict=True)])
    stacked = teach_many(modules, dataset)(observation)
    pairs = (dataset.observations, dataset.targets, dataset.learning_rate)
    by_family = family.forward(
        sgd(family, as_mlp(modules), *pairs),
        torch.stack([dataset.normalise(o) for o in observation]),
    )
    torch.testing.assert_close(stacked, one_by_one)
    torch.testing.assert_close(by_family, one_by_one)


def test_many_learners_of_a_family_are_fresh_and_reproducible():
    dataset, observation = make_dataset(), torch.randn(17)
    torch.manual_seed(1)
    policy = teach_many(MLP(), dataset, learners=5)
    torch.manual_seed(1)
    again = teach_many(MLP(), dataset, learners=5)
    everyone = observation.expand(5, 17)
    assert torch.equal(policy(everyone), again(everyone))
    assert len(policy(everyone).unique(dim=0)) == 5
    assert policy(torch.zeros(5, 3, 17)).shape == (5, 3, 6)
    assert policy(np.zeros((5, 17)), sample=True).shape == (5, 6)
    discrete = teach_many(MLP(), make_dataset("CartPole-v1"), learners=5)
    assert discrete(np.zeros((5, 4)), sample=True).shape == (5,)
    assert discrete(torch.zeros(5, 3, 4), sample=True).shape == (5, 3)
    restored = pickle.loads(pickle.dumps(policy))
    restored.load_state_dict(again.state_dict())
    assert torch.equal(restored(everyone), policy(everyone))


# --- families of modules ---------------------------------------------------------------------------------------------


class RandomFeatures(nn.Module):
    """A fixed random projection in a buffer, a frozen layer, an integer buffer, and a trained output layer."""

    def __init__(self, observation_shape=(17,), outputs=6, width=32) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(observation_shape[0], width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.output = nn.Linear(width, outputs)

    def forward(self, observations: Tensor) -> Tensor:
        return self.output(torch.tanh(self.frozen(torch.tanh(observations @ self.projection))))


def test_two_draws_of_one_module_family_live_side_by_side():
    torch.manual_seed(0)
    family, observations = ModuleFamily(RandomFeatures), torch.randn(4, 5, 17)
    first = family.draw(4, (17,), 6)
    before = family.forward(first, observations)
    second = family.draw(2, (17,), 6)
    other = family.draw(2, (3,), 1)
    assert torch.equal(family.forward(first, observations), before)
    assert not torch.equal(family.forward(second, observations[:2]), before[:2])
    assert family.forward(other, torch.zeros(2, 5, 3)).shape == (2, 5, 1)


def test_only_what_is_trainable_takes_the_step():
    torch.manual_seed(0)
    dataset, family = make_dataset(), ModuleFamily(RandomFeatures)
    params = family.draw(3, (17,), 6)
    taught = sgd(family, params, dataset.observations, dataset.targets, dataset.learning_rate)
    moved = {name for name, value in taught.items() if not torch.equal(value, params[name])}
    assert moved == {"output.weight", "output.bias"}
    assert {name for name in params if name.startswith(FIXED)} == params.keys() - moved


class Masked(nn.Linear):
    """Keeps what it is told beside its parameters and buffers, and remembers what it was asked last."""

    def __init__(self, mask) -> None:
        super().__init__(17, 6)
        self.kept, self.last = [mask], None

    def forward(self, observations: Tensor) -> Tensor:
        self.last = observations
        outputs = super().forward(observations)
        return outputs if self.kept[0] is None else outputs * self.kept[0]


@pytest.mark.parametrize("masks", [(torch.ones(6), torch.zeros(6)), (None, torch.zeros(6)), (torch.zeros(6), None)])
def test_modules_may_not_differ_in_what_is_no_buffer(masks):
    with pytest.raises(ValueError, match=r"module 1 does something else than the first .* has to be a buffer"):
        teach_many([Masked(mask) for mask in masks], make_dataset())


def test_modules_may_remember_what_does_not_matter():
    remembering, spectral = [Masked(torch.ones(6)) for _ in range(2)], [nn.Linear(17, 6) for _ in range(2)]
    remembering[0](torch.zeros(1, 17))
    for modules in (remembering, [nn.utils.spectral_norm(module) for module in spectral]):
        taught, observations = teach_many(modules, make_dataset()), torch.randn(2, 3, 17)
        for index, module in enumerate(modules):
            alone = teach(module, make_dataset())
            torch.testing.assert_close(taught(observations)[index], alone(observations[index]), rtol=1e-3, atol=1e-3)


def test_families_of_one_module_with_other_arguments_are_told_apart():
    narrow, wide = (ModuleFamily(partial(RandomFeatures, width=width)) for width in (8, 16))
    assert narrow.describe() != wide.describe()
    assert "RandomFeatures, width=8" in narrow.describe()["init_args"]["factory"]


# --- whatever a user brings ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.block, self.outputs = nn.Linear(17, 32), nn.Linear(32, 32), nn.Linear(32, 6)
        self.norm = nn.LayerNorm(32)

    def forward(self, observations: Tensor) -> Tensor:
        hidden = torch.relu(self.inputs(observations))
        return self.outputs(hidden + torch.relu(self.block(self.norm(hidden))))


class Attention(nn.Module):
    """Every number of the observation is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(17, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1)
        self.outputs = nn.Linear(16, 6)

    def forward(self, observations: Tensor) -> Tensor:
        tokens = observations.unsqueeze(-1) * self.embed
        return self.outputs(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """One matrix used twice, and once more under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs = nn.Linear(17, 32), nn.Linear(32, 32), nn.Linear(32, 6)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.hidden.weight

    def forward(self, observations: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(torch.tanh(self.inputs(observations))))
        return self.outputs(torch.tanh(self.again(hidden)))


class Keys(nn.Module):
    """A parameter whose name is that of a dictionary's method."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.outputs = nn.Parameter(torch.randn(32, 17) / 4), nn.Linear(32, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return self.outputs(torch.tanh(observations @ self.keys.mT))


MODULES = {
    "linear": lambda: nn.Linear(17, 6),
    "keys": Keys,
    "residual_layer_norm": Residual,
    "attention": Attention,
    "tied": Tied,
    "buffers_and_frozen": RandomFeatures,
    "batch_norm": lambda: nn.Sequential(nn.Linear(17, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 6)),
    "dropout": lambda: nn.Sequential(nn.Linear(17, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 6)),
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(17, 32)), nn.Linear(32, 6)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 17)), nn.Conv1d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 15, 6)
    ),
}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", MODULES)
def test_any_module_learns_and_is_left_as_it_was(name):
    torch.manual_seed(0)
    module, dataset = MODULES[name](), make_dataset(learning_rate=torch.tensor(0.1))
    next(module.children(), module).eval()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before, modes, random_state = state_of(module), [m.training for m in module.modules()], torch.get_rng_state()
    policy = teach(module, dataset)

    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert all((parameter.grad == 3.0).all() for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)

    reference = copy.deepcopy(module).eval()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(reference(dataset.observations), dataset.targets)
    loss.backward()
    optimizer.step()
    for key, value in policy.module.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], atol=1e-6, rtol=1e-5)
    taught_loss = nn.functional.mse_loss(policy.module(dataset.observations), dataset.targets)
    assert taught_loss < loss

    observation = torch.randn(17)
    torch.testing.assert_close(policy(observation), policy(observation.expand(3, 17))[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(policy(observation), policy(observation)), "acts in evaluation mode: nothing random in it"


@pytest.mark.parametrize("name", MODULES)
def test_any_module_is_taught_by_the_stack_as_alone(name):
    torch.manual_seed(0)
    modules, dataset = [MODULES[name]() for _ in range(3)], make_dataset(learning_rate=torch.tensor(0.1))
    before, random_state = [state_of(module) for module in modules], torch.get_rng_state()
    stacked = teach_many(modules, dataset)
    assert torch.equal(torch.get_rng_state(), random_state)
    for module, state in zip(modules, before, strict=True):
        assert module.training
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    observation = torch.randn(3, 17)
    alone = torch.stack([teach(m, dataset)(o) for m, o in zip(modules, observation, strict=True)])
    torch.testing.assert_close(stacked(observation), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_the_meta_gradient_passes_through_any_module(name):
    torch.manual_seed(0)
    dataset, family = make_dataset(), ModuleFamily(lambda shape, outputs: MODULES[name]())
    observations = dataset.observations.clone().requires_grad_()
    params = family.draw(2, (17,), 6)
    taught = sgd(family, params, observations, dataset.targets, dataset.learning_rate)
    family.forward(taught, torch.randn(2, 3, 17)).square().mean().backward()
    assert observations.grad.isfinite().all()
    assert observations.grad.abs().sum() > 0


def test_images():
    frames = torch.rand(6, 3, 12, 12)
    dataset = make_dataset(
        "CartPole-v1",
        observations=frames,
        targets=torch.randn(6, 2),
        observation_mean=torch.zeros(3, 12, 12),
        observation_std=torch.full((3, 12, 12), 255.0),
    )
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 2))
    policy = teach(module, dataset)
    action = policy(np.zeros((3, 12, 12), dtype=np.uint8))
    assert isinstance(action, np.integer)
    assert policy(torch.zeros(5, 3, 12, 12, dtype=torch.uint8)).shape == (5,)


def test_in_place_teaches_the_callers_module():
    torch.manual_seed(0)
    module, dataset, observation = nn.Sequential(nn.Linear(17, 6), nn.Dropout(0.5)), make_dataset(), torch.randn(17)
    expected = teach(module, dataset)(observation)
    policy = teach(module, dataset, in_place=True)
    assert policy.module is module
    assert not module.training
    assert torch.equal(policy(observation), expected)


def test_in_place_leaves_a_module_that_does_not_fit_as_it_was():
    module = nn.Sequential(nn.Linear(17, 5), nn.Dropout(0.5))
    before = state_of(module)
    with pytest.raises(ValueError, match=r"module returns shape \[8, 5\], expected \[8, 6\]"):
        teach(module, make_dataset(), in_place=True)
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_turned_gradients_off(context, tmp_path):
    path = make_dataset().save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    expected = teach(MODULES["batch_norm"](), load(path))(torch.ones(17))
    expected_many = teach_many([MODULES["batch_norm"]()], load(path))(torch.ones(1, 17))
    with context():
        torch.manual_seed(0)
        policy = teach(MODULES["batch_norm"](), load(path))
        many = teach_many([MODULES["batch_norm"]()], load(path))
        assert torch.equal(policy(torch.ones(17)), expected)
        assert torch.equal(many(torch.ones(1, 17)), expected_many)
    assert torch.equal(policy(torch.ones(17)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_of_other_dtypes(dtype):
    torch.manual_seed(0)
    dataset, module, observation = make_dataset(), nn.Linear(17, 6), torch.randn(17)
    expected = teach(module, dataset)(observation)
    policy = teach(module.to(dtype), dataset)
    assert policy.module.weight.dtype == dtype
    assert policy(observation).dtype == torch.float32
    tolerance = {"atol": 0.1 if dtype == torch.bfloat16 else 1e-5, "rtol": 0.0}
    torch.testing.assert_close(policy(observation), expected, **tolerance)
    torch.testing.assert_close(teach_many([module], dataset)(observation[None])[0], expected, **tolerance)


@pytest.mark.parametrize("rule", STEP_RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_of_half_precision_by_every_rule(dtype, rule):
    """They take the step that they would take in single precision, rounded at the end."""
    dataset = dataclasses.replace(load("cartpole_1d"), line_search_scale=torch.tensor(1.0))
    probe = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).to(dtype)
        alone, many = teach(module, dataset, rule), teach_many([module], dataset, step_rule=rule)
        for name, expected in teach(copy.deepcopy(module).float(), dataset, rule).module.named_parameters():
            for found in (dict(alone.module.named_parameters())[name], many.module.params[name][0]):
                assert found.dtype == dtype
                torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-4)
        assert alone(probe).shape == (32,)


class OddlyNamed(nn.Module):
    """Parameters whose names a ``ParameterDict`` cannot hold as they are, and a last layer that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("in/put~1", nn.Linear(17, 8))
        self.last = nn.Linear(8, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return self.last(input=torch.tanh(getattr(self, "in/put~1")(observations)))


def test_any_names_and_a_last_layer_called_by_keyword():
    torch.manual_seed(0)
    modules, observations = [OddlyNamed(), OddlyNamed()], torch.randn(2, 17)
    dataset = make_dataset(newton_ridge=torch.tensor(0.1))
    for rule in ("sgd", "newton"):
        many = teach_many(modules, dataset, step_rule=rule)
        assert set(many.module.params) == set(dict(modules[0].named_parameters()))
        for module, observation, action in zip(modules, observations, many(observations), strict=True):
            torch.testing.assert_close(teach(module, dataset, rule)(observation), action)


def test_learners_of_any_number_are_taught_in_portions(monkeypatch):
    torch.manual_seed(0)
    modules, dataset, observations = [nn.Linear(17, 6) for _ in range(5)], make_dataset(), torch.randn(5, 3, 17)
    expected = teach_many(modules, dataset)(observations)
    monkeypatch.setattr("lightning_distill.teaching.AT_ONCE", 16)  # of 8 pairs: two learners at once
    torch.testing.assert_close(teach_many(modules, dataset)(observations), expected)


def test_what_is_no_dataset_is_named():
    with pytest.raises(
        ValueError, match="dataset: is a NoneType, expected a DistilledDataset, a name in the zoo or a path"
    ):
        teach(nn.Linear(17, 6), None)


class WithLogStd(nn.Module):
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.mean = nn.Linear(17, 6)
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, observations: Tensor) -> Tensor:
        return self.mean(observations)


@pytest.mark.parametrize(
    ("name", "shape", "given"),
    [("log_std", (6,), None), ("logstd", (1, 6), None), ("actor_logstd", (1, 6), "actor_logstd")],
)
def test_a_log_std_of_the_modules_own_is_set(name, shape, given):
    dataset, module = make_dataset(), WithLogStd(name, shape)
    policy = teach(nn.Sequential(module), dataset, log_std=given and f"0.{given}")
    assert torch.equal(getattr(policy.module[0], name).detach(), dataset.log_std.view(shape))
    assert not getattr(module, name).any()


def test_other_parameters_are_no_log_std():
    dataset = make_dataset()
    for name, shape in (("log_std", (5,)), ("spread", (6,))):
        assert not getattr(teach(WithLogStd(name, shape), dataset).module, name).any()
    with pytest.raises(ValueError, match=r"log_std='log_std': shape \[5\], expected \[6\] or \[1, 6\]"):
        teach(WithLogStd("log_std", (5,)), dataset, log_std="log_std")
    with pytest.raises(ValueError, match=r"log_std='spread': the module has .*mean\.weight"):
        teach(WithLogStd("log_std", (6,)), dataset, log_std="spread")
    with pytest.raises(ValueError, match=r"log_std='log_std': the dataset's actions are discrete"):
        teach(nn.Linear(4, 2), make_dataset("CartPole-v1"), log_std="log_std")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(17, 6)

    def forward(self, observations: Tensor) -> tuple[Tensor, None]:
        return self.linear(observations), None


class Detached(Pair):
    def forward(self, observations: Tensor) -> Tensor:
        return self.linear(observations).detach()


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Linear(16, 6), r"does not accept observations of shape \[8, 17\]: mat1 and mat2"),
        (nn.Linear(17, 1), r"module returns shape \[8, 1\], expected \[8, 6\]"),
        (nn.Sequential(nn.Linear(17, 6), nn.Flatten(0)), r"module returns shape \[48\], expected \[8, 6\]"),
        (Pair(), r"module returns a tuple, expected a tensor of shape \[8, 6\]"),
        (nn.Linear(17, 6).requires_grad_(False), r"no trainable parameter"),
        (nn.Identity(), r"no trainable parameter"),
        (nn.Embedding(17, 6), r"does not accept observations"),
    ],
)
def test_modules_that_do_not_fit(module, match):
    with pytest.raises(ValueError, match=match):
        teach(module, make_dataset())
    with pytest.raises(ValueError, match=r"does not accept|returns|no trainable"):
        teach_many([module, module], make_dataset())


@pytest.mark.parametrize("teaching", [teach, lambda module, dataset: teach_many([module, module], dataset)])
def test_parameters_without_a_shape_are_named(teaching):
    with pytest.raises(ValueError, match="weight has no shape yet: run it once"):
        teaching(nn.LazyLinear(6), make_dataset())


class Recurrent(nn.Module):
    """Which ``torch.func.vmap`` cannot map."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.linear = nn.LSTM(17, 16), nn.Linear(16, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return self.linear(self.cells(observations.unsqueeze(0))[0][0])


@pytest.mark.parametrize("rule", STEP_RULES)
def test_recurrent_modules_are_taught_one_after_the_other(rule):
    torch.manual_seed(0)
    numbers = {"newton_ridge": torch.tensor(0.1), "line_search_scale": torch.tensor(1.0)}
    modules, dataset = [Recurrent() for _ in range(3)], dataclasses.replace(make_dataset(), **numbers)
    observation = torch.randn(3, 5, 17)
    alone = torch.stack([teach(m, dataset, rule)(o) for m, o in zip(modules, observation, strict=True)])
    torch.testing.assert_close(teach_many(modules, dataset, None, rule)(observation), alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rule", STEP_RULES)
def test_a_module_that_returns_more_than_one_thing_is_named_by_every_rule(rule):
    numbers = {"newton_ridge": torch.tensor(0.1), "line_search_scale": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="module returns a tuple, expected a tensor"):
        teach(Pair(), dataclasses.replace(make_dataset(), **numbers), rule)


class Gated(nn.Module):
    """A network with a parameter that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.hidden, self.outputs = nn.Linear(17, 32), nn.Linear(32, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return self.outputs(torch.tanh(self.gate * self.hidden(observations)))


@pytest.mark.parametrize("rule", STEP_RULES)
def test_a_parameter_that_is_one_number_takes_the_step_of_every_rule(rule):
    numbers = {"newton_ridge": torch.tensor(0.01), "line_search_scale": torch.tensor(1.0)}
    module, dataset = Gated(), make_dataset(learning_rate=torch.tensor(0.1), **numbers)
    loss = nn.functional.mse_loss(module(dataset.observations), dataset.targets)
    taught = teach(module, dataset, rule).module
    assert nn.functional.mse_loss(taught(dataset.observations), dataset.targets) < loss
    assert (taught.gate != module.gate) == (rule != "newton")


@pytest.mark.parametrize("rule", ["newton", "projection"])
def test_another_number_of_outputs_is_named_by_every_rule(rule):
    module = nn.Sequential(nn.Linear(17, 8), nn.Tanh(), nn.Linear(8, 5))
    dataset = dataclasses.replace(make_dataset(), newton_ridge=torch.tensor(0.1))
    for teaching in (lambda: teach(module, dataset, rule), lambda: teach_many([module, module], dataset, None, rule)):
        with pytest.raises(ValueError, match=r"module returns 5 outputs, expected 6"):
            teaching()


def test_a_dataset_may_be_given_by_its_name_or_path(tmp_path):
    module = nn.Linear(4, 2)
    path = load("cartpole_1d_plain").save(tmp_path / "here.safetensors")
    assert torch.equal(teach(module, path).module.weight, teach(module, str(path)).module.weight)
    expected = teach(module, load("cartpole_1d_plain"))
    taught = teach(module, "cartpole_1d_plain")
    assert torch.equal(taught.module.weight, expected.module.weight)
    with pytest.raises(ValueError, match=r"cartpol_1d.*did you mean cartpole_1d"):
        teach_many([module], "cartpol_1d")


def test_a_module_that_cannot_be_copied_is_taught_in_place():
    module = nn.Linear(17, 6)
    module.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"module cannot be copied .*; in_place=True"):
        teach(module, make_dataset())
    with pytest.raises(ValueError, match=r"module cannot be copied"):
        teach_many([module], make_dataset())
    assert teach(module, make_dataset(), in_place=True)(torch.zeros(17)).shape == (6,)


@pytest.mark.parametrize("step_rule", ["sgd", "newton"])
def test_a_compiled_module_is_taught_as_what_was_compiled(step_rule):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(17, 8), nn.Tanh(), nn.Linear(8, 6))
    compiled, dataset = torch.compile(module, backend="eager"), make_dataset(newton_ridge=torch.tensor(0.1))
    compiled(torch.zeros(1, 17))
    observations = torch.randn(5, 17)
    expected = teach(module, dataset, step_rule)(observations)
    torch.testing.assert_close(teach(compiled, dataset, step_rule)(observations), expected)
    torch.testing.assert_close(teach_many([compiled], dataset, step_rule=step_rule)(observations[None])[0], expected)
    assert torch.equal(teach(compiled, dataset, step_rule, in_place=True).module(observations), compiled(observations))


def test_a_module_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"outputs that depend on no trainable parameter"):
        teach(Detached(), make_dataset())


def test_what_is_no_module_is_named_in_a_stack():
    for given in ([nn.Linear(17, 6), 3], lambda shape, outputs: None):
        with pytest.raises(ValueError, match=r"module: is a (int|NoneType), expected an nn.Module"):
            teach_many(given, make_dataset(), **({} if isinstance(given, list) else {"learners": 2}))


@pytest.mark.parametrize("options", [{"width": 2.5}, {"depth": "2"}, {"gain": math.nan}, {"output_gain": math.inf}])
def test_numbers_that_no_mlp_has_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"MLP\.{name}=.*: allowed are"):
        MLP(**options)


def test_stacks_that_do_not_fit():
    dataset = make_dataset()
    with pytest.raises(ValueError, match=r"learners=None: how many"):
        teach_many(MLP(), dataset)
    with pytest.raises(ValueError, match=r"learners=3 with 1 modules"):
        teach_many([nn.Linear(17, 6)], dataset, learners=3)
    with pytest.raises(ValueError, match=r"0 modules"):
        teach_many([], dataset)
    wider = nn.Sequential(nn.Linear(17, 9), nn.Linear(9, 6))
    with pytest.raises(ValueError, match=r"modules of one architecture are needed: .* in 1"):
        teach_many([nn.Sequential(nn.Linear(17, 8), nn.Linear(8, 6)), wider], dataset)
    with pytest.raises(ValueError, match=r"returns shape \[2, 8, 5\], expected \[2, 8, 6\]"):
        teach_many(ModuleFamily(lambda shape, outputs: nn.Linear(17, 5)), dataset, learners=2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"metadata": {"step_rule": "newton"}},
            r"step_rule='newton': the dataset has no newton_ridge; allowed are sgd",
        ),
        (
            {"metadata": {"step_rule": "adam"}},
            r"step_rule='adam': allowed are sgd, line_search, newton, projection; .* of sgd$",
        ),
        ({"metadata": {"encoder_level": 1}, "encoder": {"bias": torch.ones(1)}}, r"encoder of level 1: holds bias"),
    ],
)
def test_what_a_dataset_may_ask_for_in_vain(changes, match):
    with pytest.raises(ValueError, match=match):
        teach(nn.Linear(17, 6), make_dataset(**changes))
    with pytest.raises(ValueError, match=match):
        teach_many(MLP(), make_dataset(**changes), learners=2)


# --- acting ----------------------------------------------------------------------------------------------------------


def test_actions_come_in_the_type_of_the_observation():
    dataset = make_dataset()
    policy = teach(nn.Linear(17, 6), dataset)
    observation = np.linspace(-1, 1, 17)
    action = policy(observation)
    assert isinstance(action, np.ndarray)
    assert (action.dtype, action.shape) == (np.float32, (6,))
    as_tensor = policy(torch.from_numpy(observation))
    assert isinstance(as_tensor, Tensor)
    np.testing.assert_array_equal(as_tensor.numpy(), action)
    np.testing.assert_allclose(policy(np.stack([observation] * 3))[2], action, rtol=1e-5)
    np.testing.assert_array_equal(policy(observation[::-1].copy()[::-1]), action)
    np.testing.assert_array_equal(policy(observation.tolist()), action)
    fed = dataset.normalise(torch.tensor(observation, dtype=torch.float32))
    np.testing.assert_allclose(action, policy.module(fed).detach().numpy(), rtol=1e-5)
    discrete = teach(nn.Linear(4, 2), make_dataset("CartPole-v1"))
    assert isinstance(discrete(np.zeros(4)), np.int64)
    assert discrete(np.zeros((3, 4))).shape == (3,)
    assert discrete(torch.zeros(4)).shape == ()
    for wrong in (np.zeros(5), np.zeros((2, 3, 4)), np.zeros((4, 1)), 0.0):
        with pytest.raises(ValueError, match=r"observation: shape \[.*\], expected \[4\] or \[B, 4\]"):
            discrete(wrong)


def test_far_observations_are_clipped():
    dataset = make_dataset(observation_clip=3.0)
    policy = teach(nn.Linear(17, 6), dataset)
    far = dataset.observation_mean + 1000 * dataset.observation_std
    at_the_bound = dataset.observation_mean + 3 * dataset.observation_std
    torch.testing.assert_close(policy(far), policy(at_the_bound))


@pytest.mark.parametrize("env", ["HalfCheetah-v5", "CartPole-v1"])
@pytest.mark.parametrize("sample", [False, True])
def test_an_observation_that_is_no_number_is_not_acted_on(env, sample):
    dataset = make_dataset(env)
    entries, outputs = dataset.observation_shape[0], dataset.outputs
    for policy, leading in (
        (teach(nn.Linear(entries, outputs), dataset), ()),
        (teach_many([nn.Linear(entries, outputs) for _ in range(2)], dataset), (2,)),
    ):
        observation = torch.zeros(*leading, entries)
        observation[..., -1] = torch.inf
        policy(observation, sample=sample)
        observation[..., -1] = torch.nan
        with pytest.raises(ValueError, match="observation: holds NaN"):
            policy(observation, sample=sample)


def test_sampling_follows_the_distribution_and_the_generator():
    continuous = make_dataset()
    policy, many = teach(nn.Linear(17, 6), continuous), torch.ones(20_000, 17)
    actions = policy(many, sample=True, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(actions.std(0), continuous.log_std.exp(), rtol=0.03, atol=0)
    torch.testing.assert_close(actions.mean(0), policy(many[0]), atol=0.01, rtol=0)
    random_state = torch.get_rng_state()
    assert torch.equal(policy(many, sample=True, generator=torch.Generator().manual_seed(1)), actions)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.equal(policy(many, sample=True), actions)

    dataset = make_dataset("CartPole-v1")
    policy = teach(nn.Linear(4, 2), dataset)
    observation = torch.full((20_000, 4), 0.3)
    probability = policy.module(dataset.normalise(observation[0])).softmax(-1)[1].item()
    actions = policy(observation, sample=True, generator=torch.Generator().manual_seed(1))
    assert actions.float().mean().item() == pytest.approx(probability, abs=0.02)


def test_a_policy_is_an_ordinary_module(tmp_path):
    torch.manual_seed(0)
    dataset, observation = make_dataset(), torch.randn(17)
    policy = teach(mlp_module(), dataset)
    state = policy.state_dict()
    assert {name for name in state if not name.startswith("module.")} == {
        "observation_mean",
        "observation_std",
        "log_std",
    }
    torch.save(state, tmp_path / "policy.pt")
    torch.save(policy, tmp_path / "whole.pt")
    other = teach(mlp_module(), dataset)
    assert not torch.equal(other(observation), policy(observation))
    other.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    assert torch.equal(other(observation), policy(observation))
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(whole(observation), policy(observation))
    torch.testing.assert_close(policy.double()(observation), whole(observation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logistic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_tanh(dtype, logistic, monkeypatch):
    """By the logistic function, where that is faster, in single precision: values, and derivatives of first and second order."""
    monkeypatch.setattr("lightning_distill.activations.LOGISTIC_TANH", logistic)
    inputs = torch.linspace(-12, 12, 4001, dtype=dtype).requires_grad_()
    for order in range(3):
        found, wanted = tanh(inputs), torch.tanh(inputs)
        for _ in range(order):
            (found,) = torch.autograd.grad(found.sum(), inputs, create_graph=True)
            (wanted,) = torch.autograd.grad(wanted.sum(), inputs, create_graph=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    many = torch.randn(3, 50, dtype=dtype)
    torch.testing.assert_close(torch.func.vmap(tanh)(many), torch.tanh(many), rtol=0, atol=1e-6)
