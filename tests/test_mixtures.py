"""Mixtures of learner families, and the families that are held out from them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from handmade import make_dataset
from test_teaching import MODULES, RandomFeatures
from torch import nn

from lightning_distill import MLP, Mixture, MLPs, ModuleFamily, NatureCNN, teach_many
from lightning_distill.envs import ConfigError
from lightning_distill.families import (
    FAMILIES,
    HELD_OUT,
    can_draw,
    families_apart,
    family_from,
    family_named,
    held_out_from,
)
from lightning_distill.learners import count_learners
from lightning_distill.mixtures import members
from lightning_distill.nature import FRAME_FAMILIES
from lightning_distill.step_rules import STEP_RULES


def widths(params) -> dict[int, int]:
    """Width → learners of it, of one-layer learners in a mixture."""
    return {value.shape[-1]: len(value) for name, value in params.items() if name.endswith("0.weight")}


def one_layer(*sizes: int) -> list[MLP]:
    return [MLP(width=size, depth=1) for size in sizes]


def test_a_draw_holds_as_many_learners_of_each_family_as_their_weights_say():
    weighted = Mixture(one_layer(3, 5, 7), each=2, weights=[1, 2, 1])
    for _ in range(5):
        assert widths(weighted.draw(8, (4,), 2)) == {3: 2, 5: 4, 7: 2}
    params = weighted.draw(7, (4,), 2)
    assert count_learners(params) == sum(widths(params).values()) == 7


def test_families_are_drawn_anew_and_none_twice_while_others_wait():
    mixture = Mixture(one_layer(*range(2, 12)), each=2)
    seen = [widths(mixture.draw(10, (4,), 2)) for _ in range(40)]
    assert all(len(drawn) == 5 and set(drawn.values()) == {2} for drawn in seen)
    counts = [sum(width in drawn for drawn in seen) for width in range(2, 12)]
    assert 8 < min(counts) <= max(counts) < 32, "each family in half of the draws"


def test_learners_of_a_mixture_compute_what_they_compute_alone():
    torch.manual_seed(0)
    parts = [MLP(width=5), ModuleFamily(lambda shape, outputs: MODULES["batch_norm"]()), *one_layer(3)]
    mixture = Mixture([Mixture(parts[:2], each=1), parts[2]], each=2)
    params = mixture.draw(4, (17,), 6)
    assert any(name.startswith("fixed:") for name in params), "buffers stay marked"
    observations = torch.randn(4, 9, 17)
    outputs = mixture.forward(params, observations)
    alone = []
    mixture.map(lambda part, its: alone.append((part, its)) or its, params)
    assert [(part, count_learners(its)) for part, its in alone] == [(parts[0], 1), (parts[1], 1), (parts[2], 2)]
    split = observations.split([1, 1, 2])
    expected = torch.cat([part.forward(its, o) for (part, its), o in zip(alone, split, strict=True)])
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("rule", STEP_RULES)
def test_every_rule_teaches_each_learner_of_a_mixture_as_alone(rule):
    torch.manual_seed(0)
    numbers = {"newton_ridge": torch.tensor(0.05), "line_search_scale": torch.tensor(1.3)}
    dataset, mixture = make_dataset(**numbers), Mixture(one_layer(3, 5, 7), each=2)
    torch.manual_seed(1)
    params = mixture.draw(6, (17,), 6)
    torch.manual_seed(1)
    policy = teach_many(mixture, dataset, 6, rule)
    assert policy.learners == 6
    numbers = [getattr(dataset, number) for number in STEP_RULES[rule].numbers]
    taught = []
    mixture.map(
        lambda part, its: (
            taught.append(
                part.forward(
                    STEP_RULES[rule](part, its, dataset.observations, dataset.targets, *numbers), torch.ones(2, 1, 17)
                )
            )
            or its
        ),
        params,
    )
    observation = dataset.observation_mean + dataset.observation_std
    torch.testing.assert_close(policy(observation.expand(6, 17)), torch.cat(taught)[:, 0], atol=1e-5, rtol=1e-5)


def test_a_grid_is_every_combination():
    grid = MLPs([3, 5], [1, 2], ["tanh", "relu"], ["orthogonal", "default"], ["none", "layer"], gains=[1.0, 2.0])
    assert len(members(grid)) == 2 * 2 * 2 * 2 * 3
    assert len({str(member.describe()) for member in members(grid)}) == 48
    assert can_draw(grid, MLP(width=5, activation="relu", gain=2.0, norm="layer"))
    assert not can_draw(grid, MLP(width=5, activation="relu", gain=1.5))
    assert not can_draw(grid, MLP(width=4, gain=1.0))


def test_what_makes_no_difference_makes_no_other_family():
    grid = MLPs([64], [2], ["tanh", "relu"], ["orthogonal", "xavier", "kaiming", "default"], gains=[1.0, 2**0.5])
    for name in ("paper", "relu", "gain_1", "xavier", "kaiming", "default_init"):
        assert can_draw(grid, FAMILIES[name]), name
    assert can_draw(MLP(depth=0, width=9, activation="relu"), FAMILIES["linear"])
    assert can_draw(NatureCNN(init="xavier", gain=1.0), FRAME_FAMILIES["nature_xavier"]())
    assert not can_draw(MLP(output_gain=1.0), FAMILIES["paper"])
    assert not can_draw(MLP(depth=0, output_gain=1.0), FAMILIES["linear"])


@pytest.mark.parametrize(
    ("base", "arguments"),
    [(MLP, {}), (NatureCNN, {}), (Mixture, {"families": ["relu"]}), (MLPs, {"widths": [8], "depths": [1]})],
)
def test_a_class_of_ones_own_is_not_taken_for_what_it_was_made_of(base, arguments):
    own = type("Own", (base,), {})(**arguments)
    assert not can_draw(family_named("paper"), own)
    with pytest.raises(ValueError, match=r"class_path='.*Own': from a description only families of lightning_distill"):
        family_from(own.describe())


def test_layer_norm_of_the_mlp_is_that_of_torch():
    torch.manual_seed(0)
    family, observations = MLP(width=8, depth=1, norm="layer", activation="relu", output_gain=1.0), torch.randn(1, 5, 3)
    params = family.draw(1, (3,), 2)
    params["0.norm.weight"] = torch.randn(1, 1, 8)
    params["0.norm.bias"] = torch.randn(1, 1, 8)
    weight, bias = params["0.norm.weight"].flatten(), params["0.norm.bias"].flatten()
    hidden = torch.nn.functional.layer_norm(observations @ params["0.weight"] + params["0.bias"], (8,), weight, bias)
    torch.testing.assert_close(family.forward(params, observations), hidden.relu() @ params["1.weight"])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_named_family_can_be_drawn_taught_by_every_rule_and_described(name):
    family = family_named(name)
    assert family_from(family.describe()).describe() == family.describe()
    numbers = {"newton_ridge": 0.05, "line_search_scale": 1.0}
    dataset = make_dataset(**{name: torch.tensor(value) for name, value in numbers.items()})
    for rule in STEP_RULES:
        outputs = teach_many(family, dataset, 3, rule)(torch.ones(3, 2, 17))
        assert outputs.shape == (3, 2, 6)
        assert outputs.isfinite().all()


def test_held_out_families_are_not_trained_on_and_cover_what_they_should():
    mixture = family_named("mixture")
    assert len(HELD_OUT) >= 12
    for trained in (mixture, family_named("paper")):
        assert not [name for name in HELD_OUT if can_draw(trained, FAMILIES[name])]
        assert list(families_apart({name: FAMILIES[name] for name in HELD_OUT}, trained)) == list(HELD_OUT)
    mlps = [FAMILIES[name] for name in HELD_OUT if isinstance(FAMILIES[name], MLP)]
    covered = {
        key: {getattr(family, key) for family in mlps} for key in ("width", "depth", "activation", "init", "norm")
    }
    assert {32, 64, 256, 512} <= covered["width"]
    assert {0, 2, 5} <= covered["depth"]
    assert covered["activation"] == {"tanh", "relu", "gelu", "silu", "elu", "sin"}
    assert covered["init"] == {"orthogonal", "xavier", "kaiming", "default"}
    assert "layer" in covered["norm"]
    assert {"residual", "attention"} <= set(HELD_OUT)


def test_what_is_held_out_by_default_fits_the_observations():
    assert held_out_from((17,)) == held_out_from((512,)) == HELD_OUT
    assert held_out_from((513,)) == tuple(name for name in HELD_OUT if name != "attention")
    assert "nature_xavier" in held_out_from((4, 84, 84))
    assert all(name in FRAME_FAMILIES for name in held_out_from((4, 84, 84)))


def test_functions_of_one_name_are_families_of_their_own():
    def of_width(width):
        return ModuleFamily(lambda shape, outputs: nn.Sequential(nn.Linear(shape[0], width), nn.Linear(width, outputs)))

    narrow, wide = of_width(8), of_width(16)
    assert list(families_apart({"wide": wide, "same": narrow}, narrow)) == ["wide", "same (trained on)"]
    partials = [ModuleFamily(partial(RandomFeatures, width=width)) for width in (8, 8, 16)]
    assert list(families_apart(dict(zip("ab", partials[1:], strict=True)), partials[0])) == ["a (trained on)", "b"]


def test_families_that_are_trained_on_are_told_apart():
    named = {"relu": FAMILIES["relu"], "mine": Mixture([MLP(), MLP(width=3)])}
    told = families_apart(named, MLPs([64], [2], ["tanh", "relu"]))
    assert list(told) == ["relu (trained on)", "mine (trained on)"]
    assert families_apart(told, MLP(activation="relu")) == told
    assert list(families_apart(named, MLP(width=9))) == ["relu", "mine"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Mixture([]), r"Mixture.families=\[\]"),
        (lambda: Mixture(["paper"], each=0), "Mixture.each=0"),
        (lambda: Mixture(["paper"], weights=[1.0, 2.0]), r"Mixture.weights=\[1.0, 2.0\]: allowed are 1 positive"),
        (lambda: Mixture(["paper"], weights=[-1.0]), r"Mixture.weights=\[-1.0\]"),
        (lambda: MLPs([], [1]), r"MLPs.widths=\[\]"),
        (lambda: MLPs([0], [1]), r"MLP.width=0"),
        (lambda: MLP(norm="batch"), r"MLP.norm='batch': allowed are none, layer"),
    ],
)
def test_wrong_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_unknown_name_in_a_mixture_is_named():
    with pytest.raises(ConfigError, match="family='nonsense': allowed are paper"):
        Mixture(["paper", "nonsense"])


@pytest.mark.parametrize(
    "description",
    [
        {"class_path": "os.system", "init_args": {"command": "true"}},
        {"class_path": "lightning_distill.ModuleFamily", "init_args": {"factory": "os.system"}},
        {"class_path": "lightning_distill.Mixture", "init_args": {"families": [{"class_path": "os.system"}]}},
        {"class_path": "lightning_distill.Mixture", "init_args": {"families": "paper"}},
        {"class_path": "lightning_distill.MLPs", "init_args": {"widths": [3]}},
        {"class_path": "lightning_distill.MLP", "init_args": [3]},
    ],
)
def test_a_description_builds_nothing_that_does_not_come_with_the_package(description):
    with pytest.raises(ValueError, match=r"class_path|init_args"):
        family_from(description)
