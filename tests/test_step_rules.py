"""Step rules: against closed forms and finite differences, on stacks, mixtures and anybody's modules."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import make_dataset
from test_teaching import MODULES, mlp_module
from torch import Tensor, nn

from lightning_distill import MLP, ModuleFamily, load, teach, teach_many
from lightning_distill.learners import UnfitLearner
from lightning_distill.modules import StackedModules, stack_parameters
from lightning_distill.step_rules import STEP_RULES, best_steps, line_search, newton, projection
from lightning_distill.teaching import with_line_search, with_plain_step

DOCUMENT = Path(__file__).parents[1] / "docs" / "step_rules.md"


def double_problem(learners: int = 3, pairs: int = 5, **arguments):
    """A small family with its learners, pairs, and a number for a rule, all float64."""
    torch.manual_seed(0)
    family = MLP(**{"width": 4, "init": "default", **arguments})
    params = {name: value.double() for name, value in family.draw(learners, (3,), 2).items()}
    observations, targets = (torch.randn(pairs, d, dtype=torch.float64, requires_grad=True) for d in (3, 2))
    return family, params, observations, targets, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def newton_dataset(**changes):
    numbers = {"newton_ridge": torch.tensor(0.05), "line_search_scale": torch.tensor(1.3)}
    return make_dataset(**{"metadata": {"step_rule": "newton"}, **numbers, **changes})


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 7])
def test_newton_is_ridge_regression_on_centred_features(width):
    """Least squares of the augmented system [φ; √μ I] W = [y; 0], learner by learner in numpy; fewer features than pairs, and more."""
    family, params, x, y, ridge = double_problem(width=width, pairs=5)
    taught = newton(family, params, x, y, ridge)
    probe = torch.randn(3, 6, 3, dtype=torch.float64)
    outputs = family.forward(taught, probe).detach().numpy()
    features = [family.features(params, o).detach().numpy() for o in (x.expand(3, 5, 3), probe)]
    targets = y.detach().numpy()
    for k in range(3):
        mean = features[0][k].mean(0)
        centred = features[0][k] - mean
        damping = 0.3 * (centred**2).sum() / 5
        system = np.concatenate([centred, np.sqrt(damping) * np.eye(width)])
        right = np.concatenate([targets - targets.mean(0), np.zeros((width, 2))])
        weight = np.linalg.lstsq(system, right, rcond=None)[0]
        np.testing.assert_allclose(outputs[k], targets.mean(0) + (features[1][k] - mean) @ weight, atol=1e-10)


def test_newton_without_damping_meets_the_targets_whatever_the_last_layer_was():
    family, params, x, y, _ = double_problem(width=16)
    taught = newton(family, params, x, y, torch.tensor(1e-12, dtype=torch.float64))
    torch.testing.assert_close(family.forward(taught, x.expand(3, 5, 3)), y.expand(3, 5, 2), atol=1e-6, rtol=0)
    other = newton(family, params | {"2.weight": params["2.weight"] * 9}, x, y, torch.tensor(0.1).double())
    torch.testing.assert_close(other, newton(family, params, x, y, torch.tensor(0.1).double()))
    assert all(taught[name] is params[name] for name in params if not name.startswith("2."))


def test_newton_is_one_newton_step_of_the_last_layer():
    """From the initial last layer, H⁻¹ times the gradient of the loss with weight decay arrives at the same place."""
    family, params, x, y, ridge = double_problem(learners=1, width=4)
    taught = newton(family, params, x, y, ridge)
    phi = family.features(params, x.expand(1, 5, 3))[0].detach()
    centred = phi - phi.mean(0)
    decay = ridge.detach() * centred.square().sum() / 5

    def loss(flat: Tensor) -> Tensor:
        weight, bias = flat[:8].view(4, 2), flat[8:]
        return (phi @ weight + bias - y.detach()).square().sum() + decay * weight.square().sum()

    start = torch.cat([params["2.weight"].flatten(), params["2.bias"].flatten()])
    hessian, gradient = torch.func.hessian(loss)(start), torch.func.grad(loss)(start)
    arrived = start - torch.linalg.solve(hessian, gradient)
    expected = torch.cat([taught["2.weight"].flatten(), taught["2.bias"].flatten()])
    torch.testing.assert_close(arrived, expected.detach())


def test_features_that_are_all_alike_teach_the_mean():
    family, params, x, y, ridge = double_problem(activation="relu")
    dead = params | {"1.bias": params["1.bias"] - 1e3}
    taught = newton(family, dead, x, y, ridge)
    torch.testing.assert_close(family.forward(taught, torch.randn(3, 6, 3).double()), y.mean(0).expand(3, 6, 2))
    one_pair = newton(family, params, x[:1], y[:1], ridge)
    torch.testing.assert_close(family.forward(one_pair, torch.randn(3, 6, 3).double()), y[0].expand(3, 6, 2))


@pytest.mark.parametrize("rule", [newton, projection])
def test_one_learner_whose_features_are_all_alike_leaves_the_others_their_gradients(rule):
    """In single precision and with large targets, which over the smallest of numbers would be infinite."""
    family, params, x, y, ridge = double_problem(activation="relu", width=8)
    params = {name: value.float() for name, value in params.items()}
    params["1.bias"][0] -= 1e3
    x, y, ridge = (value.detach().float().requires_grad_() for value in (x, 100 * y, ridge))
    outputs = family.forward(rule(family, params, x, y, ridge), torch.randn(3, 6, 3))
    torch.testing.assert_close(outputs[0], y.mean(0).expand(6, 2))
    for gradient in torch.autograd.grad(outputs.square().sum(), (x, y, ridge)):
        assert gradient.isfinite().all()
        assert gradient.any()


class ReZero(nn.Module):
    """A residual branch that begins with no share: its weights have a gradient of exactly zero."""

    def __init__(self, observation_shape, outputs):
        super().__init__()
        self.begin, self.branch = nn.Linear(*observation_shape, 8), nn.Linear(8, 8)
        self.share = nn.Parameter(torch.zeros(()))
        self.end = nn.Linear(8, outputs)

    def forward(self, observation):
        hidden = self.begin(observation).tanh()
        return self.end(hidden + self.share * self.branch(hidden).tanh())


@pytest.mark.parametrize("rule", STEP_RULES)
def test_weights_without_a_gradient_leave_the_pairs_theirs(rule):
    torch.manual_seed(0)
    family = ModuleFamily(ReZero)
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    number = torch.tensor(0.3, requires_grad=True)
    taught = STEP_RULES[rule](family, family.draw(3, (3,), 2), x, y, number)
    for gradient in torch.autograd.grad(family.forward(taught, torch.randn(3, 6, 3)).square().sum(), (x, y, number)):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_line_search_takes_the_step_that_finite_differences_say():
    family, params, x, y, scale = double_problem(width=8)
    taught = line_search(family, params, x, y, scale)
    for k in range(3):
        mine = {name: value[k : k + 1].requires_grad_() for name, value in params.items()}
        outputs = family.forward(mine, x[None])
        gradients = torch.autograd.grad((outputs - y).square().mean(), list(mine.values()))
        far = 1e-6
        moved = {name: value + far * g for (name, value), g in zip(mine.items(), gradients, strict=True)}
        change = (family.forward(moved, x[None]) - outputs) / far
        step = 0.3 * ((outputs - y) * change).sum() / change.square().sum()
        for name, gradient in zip(mine, gradients, strict=True):
            torch.testing.assert_close(taught[name][k : k + 1], mine[name] - step * gradient, atol=1e-6, rtol=1e-5)


def test_line_search_of_a_linear_learner_ends_at_the_minimum_along_the_gradient():
    family, params, x, y, _ = double_problem(depth=0)
    taught = line_search(family, params, x, y, torch.tensor(1.0).double())

    def loss(share: float) -> Tensor:
        at = {name: params[name] + share * (taught[name] - params[name]) for name in params}
        return (family.forward(at, x.expand(3, 5, 3)) - y).square().mean((1, 2))

    assert (loss(1.0) < loss(0.99)).all()
    assert (loss(1.0) < loss(1.01)).all()


@pytest.mark.parametrize("rule", STEP_RULES)
def test_rules_are_differentiable_in_pairs_and_number(rule):
    family, params, *inputs = double_problem(learners=2, pairs=3)
    probe = torch.randn(2, 4, 3, dtype=torch.float64)

    def outputs_after(*inputs: Tensor) -> Tensor:
        return family.forward(STEP_RULES[rule](family, params, *inputs), probe)

    assert torch.autograd.gradcheck(outputs_after, inputs)


def test_projection_steps_along_the_polar_factor_of_the_gradient_of_the_loss_with_the_best_last_layer(monkeypatch):
    """The gradient of the reduced loss min_W ‖φ W + b − y‖² + μ ‖W‖², μ held, by finite differences; its factor by iteration of
    the singular values of numpy."""
    monkeypatch.setattr("lightning_distill.step_rules.LENGTHS", (0.2,))
    family, params, x, y, ridge = double_problem(learners=1, width=4, depth=1)
    x, y, ridge = x.detach(), y.detach(), ridge.detach()
    phi = family.features(params, x[None])[0]
    decay = ridge * (phi - phi.mean(0)).square().sum() / 5

    def reduced(weight: Tensor) -> float:
        features = family.features(params | {"0.weight": weight}, x[None])[0]
        features = torch.cat([features - features.mean(0), decay.sqrt() * torch.eye(4)])
        right = torch.cat([y - y.mean(0), torch.zeros(4, 2)])
        solved = torch.linalg.lstsq(features, right).solution
        return (features @ solved - right).square().sum().item()

    gradient, far = torch.zeros(3, 4).double(), 1e-5
    for index in range(12):
        shift = torch.zeros(12).double()
        shift[index] = far
        ahead, behind = (params["0.weight"] + sign * shift.view(1, 3, 4) for sign in (1, -1))
        gradient.view(-1)[index] = (reduced(ahead) - reduced(behind)) / (2 * far)
    u, values, v = np.linalg.svd(gradient.numpy(), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert 0.6 < values.min() < values.max() < 1.25
    taught = projection(family, params, x, y, ridge)
    moved = {name: (params[name] - taught[name])[0].detach() for name in ("0.weight", "0.bias")}
    factor = torch.from_numpy(u * values @ v) / np.linalg.norm(values)
    torch.testing.assert_close(moved["0.weight"], 0.2 * params["0.weight"].norm() * factor, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(moved["0.bias"].norm(), torch.tensor(0.2 * 2.0).double())  # four entries, as if 1 each
    again = newton(family, params | {n: taught[n] for n in ("0.weight", "0.bias")}, x, y, ridge)
    torch.testing.assert_close(again, taught)


def test_projection_lengthens_each_learners_step_until_its_loss_rises(monkeypatch):
    """Each learner its own: of learners with other gains not all take the same; one passes over a lower loss beyond a rise."""
    lengths = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    monkeypatch.setattr("lightning_distill.step_rules.LENGTHS", lengths)
    family, params, x, y, ridge = double_problem(learners=24, width=6, pairs=9, depth=2)
    params["1.weight"] = params["1.weight"] * torch.logspace(-1, 1, 24).double().view(24, 1, 1)
    taught = projection(family, params, x, y, ridge)
    tried, losses = [], []
    for length in lengths:
        monkeypatch.setattr("lightning_distill.step_rules.LENGTHS", (length,))
        tried.append(projection(family, params, x, y, ridge))
        losses.append((family.forward(tried[-1], x.expand(24, 9, 3)) - y).square().mean((1, 2)).tolist())
    expected = []
    for loss in zip(*losses, strict=True):
        at = 0
        while at < len(loss) - 1 and loss[at + 1] < loss[at]:
            at += 1
        expected.append(at)
    assert len(set(expected)) > 2
    assert expected != torch.tensor(losses).argmin(0).tolist()
    for k, at in enumerate(expected):
        for name in params:
            torch.testing.assert_close(taught[name][k], tried[at][name][k])


def test_projection_does_not_take_a_step_that_overflows(monkeypatch):
    family, params, x, y, ridge = double_problem(width=6, activation="relu")
    params = {name: value.float() for name, value in params.items()}
    pairs = [value.detach().float() for value in (x, y, ridge)]
    taught = {}
    for lengths in ((1e-3,), (1e30,), (1e-3, 1e30)):
        monkeypatch.setattr("lightning_distill.step_rules.LENGTHS", lengths)
        taught[lengths] = projection(family, params, *pairs)
    assert taught[1e30,]["2.weight"].isnan().any()
    torch.testing.assert_close(taught[1e-3, 1e30], taught[1e-3,])


def test_projection_of_a_linear_learner_is_newton():
    family, params, x, y, ridge = double_problem(depth=0)
    torch.testing.assert_close(projection(family, params, x, y, ridge), newton(family, params, x, y, ridge))


# --- anybody's modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["line_search", "newton", "projection"])
@pytest.mark.parametrize("name", MODULES)
def test_any_module_is_taught_alone_as_in_a_stack_and_as_in_training(name, rule):
    torch.manual_seed(0)
    modules, dataset, observation = [MODULES[name]() for _ in range(3)], newton_dataset(), torch.randn(3, 17)
    states = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    policies = [teach(module, dataset, rule) for module in modules]
    alone = torch.stack([policy(o) for policy, o in zip(policies, observation, strict=True)])
    torch.testing.assert_close(teach_many(modules, dataset, None, rule)(observation), alone, atol=1e-4, rtol=1e-3)
    for module, state, policy in zip(modules, states, policies, strict=True):
        assert module.training
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert list(policy.module.state_dict()) == list(state), "an ordinary module of the same architecture"
        loss = nn.functional.mse_loss(policy.module(dataset.observations), dataset.targets)
        assert loss < nn.functional.mse_loss(module.eval()(dataset.observations), dataset.targets)

    # In training: differentiable, through the stack.
    drawn = iter(modules)
    family = ModuleFamily(lambda shape, outputs: next(drawn))
    params = family.draw(3, (17,), 6)
    pairs = dataset.observations.clone().requires_grad_()
    numbers = [getattr(dataset, number) for number in STEP_RULES[rule].numbers]
    taught = STEP_RULES[rule](family, params, pairs, dataset.targets, *numbers)
    outputs = family.forward(taught, dataset.normalise(observation).unsqueeze(1))
    torch.testing.assert_close(outputs[:, 0], alone, atol=1e-4, rtol=1e-3)
    outputs.square().mean().backward()
    assert pairs.grad.isfinite().all()
    assert pairs.grad.abs().sum() > 0


@pytest.mark.parametrize("inputs", [17, 1])
@pytest.mark.parametrize("rule", STEP_RULES)
def test_rules_as_a_stranger_writes_them(rule, inputs, tmp_path, monkeypatch):
    """The code of the document, run as it stands, against ``teach``; in double precision, as polar factors lift what is rounded."""
    monkeypatch.chdir(tmp_path)
    fed = ("observations", "observation_mean", "observation_std")
    made = {name: getattr(newton_dataset(), name)[..., :inputs] for name in fed}
    dataset = load(newton_dataset(**made).save("distilled.safetensors"))
    torch.manual_seed(0)
    network = mlp_module((inputs,)).double()
    expected = teach(network, dataset, rule)(dataset.observation_mean + 0.3)
    blocks = dict(
        zip(["start", *STEP_RULES], re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S), strict=True)
    )
    assert len([line for line in blocks[rule].splitlines() if line]) <= 15
    space = {"network": network, "last": network[-1]}
    exec(blocks["start"], space)
    space |= {name: space[name].double() for name in ("x", "y")}
    exec((blocks["newton"] if rule == "projection" else "") + blocks[rule], space)
    torch.testing.assert_close(network(0.3 / dataset.observation_std.double()).float(), expected, atol=1e-5, rtol=1e-4)


def test_the_recommended_rule_is_the_default_and_others_are_a_word_away():
    torch.manual_seed(0)
    module, dataset, observation = mlp_module(), newton_dataset(), torch.randn(17)
    outputs = {rule: teach(module, dataset, rule)(observation) for rule in (None, *STEP_RULES)}
    assert torch.equal(outputs[None], outputs["newton"])
    assert len(torch.stack(list(outputs.values())).unique(dim=0)) == len(STEP_RULES)
    assert torch.equal(teach(module, make_dataset())(observation), outputs["sgd"])


def test_newton_in_place_writes_into_the_module():
    torch.manual_seed(0)
    module, dataset = mlp_module(), newton_dataset()
    first, last = module[0].weight, module[-1].weight
    before, kept = first.clone(), teach(module, dataset)(torch.ones(17))
    policy = teach(module, dataset, in_place=True)
    assert policy.module is module
    assert torch.equal(policy(torch.ones(17)), kept)
    assert (module[0].weight is first, module[-1].weight is last) == (True, True)
    assert torch.equal(first, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_newton_in_other_dtypes(dtype):
    torch.manual_seed(0)
    dataset, module = newton_dataset(), mlp_module()
    expected = teach(module, dataset)(torch.ones(17))
    policy = teach(module.to(dtype), dataset)
    assert policy.module[-1].weight.dtype == dtype
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(policy(torch.ones(17)), expected, atol=tolerance, rtol=0)


class Tied(nn.Module):
    """Its output layer's weights are used a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(17, 6)

    def forward(self, observations: Tensor) -> Tensor:
        return self.output(observations + observations @ self.output.weight.mT @ self.output.weight)


def test_wide_learners_fit_by_several_threads():
    """The system of 192 features and more is solved as well as that of few: torch's for several learners at once is not."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    observations, targets, ridge = torch.randn(512, 10), torch.randn(512, 2), torch.tensor(1e-3)
    torch.set_num_threads(2)
    try:
        for width in (192, 256, 512):
            family = MLP(width=width, depth=1)
            params = family.draw(4, (10,), 2)
            outputs = []
            for dtype in (torch.float32, torch.float64):
                fresh = {name: value.to(dtype) for name, value in params.items()}
                taught = newton(family, fresh, *(value.to(dtype) for value in (observations, targets, ridge)))
                outputs.append(family.forward(taught, observations.to(dtype).expand(4, -1, -1)).double())
            found, expected = outputs
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Sequential(nn.Linear(17, 6), nn.Tanh()), r"outputs that are those of the last nn.Linear called, '0'"),
        (nn.Sequential(nn.Linear(17, 12), nn.GLU()), r"outputs that are those of the last nn.Linear called"),
        (nn.Sequential(nn.Linear(17, 6), nn.Linear(6, 6, bias=False)), r"'1.bias' is no trainable parameter"),
        (nn.Sequential(nn.Linear(17, 6), nn.Linear(6, 6).requires_grad_(False)), r"'1.weight' is no trainable"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(17, 6)), r"'weight' is no trainable parameter"),
        (nn.Sequential(nn.Unflatten(1, (1, 17)), nn.Conv1d(1, 6, 17), nn.Flatten()), r"does not have.*sgd"),
        (nn.Bilinear(17, 17, 6), r"does not accept observations"),
        (Tied(), r"they are not"),
    ],
)
def test_modules_that_newton_cannot_teach(module, match):
    for teaching in (lambda: teach(module, newton_dataset()), lambda: teach_many([module, module], newton_dataset())):
        with pytest.raises(ValueError, match=match) as raised:
            teaching()
        assert isinstance(raised.value, UnfitLearner) == ("accept" not in match)
    if "accept" not in match:
        teach(module, newton_dataset(), "sgd")


# --- numbers that were not learned -----------------------------------------------------------------------------------


def test_a_line_search_is_as_long_as_the_plain_step_on_the_family():
    torch.manual_seed(0)
    dataset, family = make_dataset(), MLP()
    extended = with_line_search(dataset, family)
    params = family.draw(64, (17,), 6)
    steps = best_steps(family, params, dataset.observations, dataset.targets)
    assert (extended.line_search_scale * steps).log().mean().exp().item() == pytest.approx(0.7, rel=0.1)
    assert with_line_search(extended, MLP(width=8)) is extended
    random_state = torch.get_rng_state()
    back = with_plain_step(extended, family)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert back.learning_rate.item() == pytest.approx(0.7, rel=1e-5)


def test_output_layer_of_a_stack_is_found_once_and_its_features_are_its_inputs():
    torch.manual_seed(0)
    modules, observations = [mlp_module() for _ in range(2)], torch.randn(2, 5, 17)
    stack = StackedModules(mlp_module())
    features = stack.features(stack_parameters(modules), observations)
    for module, feature, observation in zip(modules, features, observations, strict=True):
        torch.testing.assert_close(feature, module[:-1](observation))
