"""Import of released files: look-alikes written by torch.save, good ones and bad ones."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from lightning_distill import ConfigError, DatasetError, evaluate, load
from lightning_distill.cli import main
from lightning_distill.importing import estimate_normaliser, import_released


def cart_pole(dimensions: int = 2, pairs: int = 3) -> dict:
    generator = torch.Generator().manual_seed(dimensions)
    return {
        "x": torch.randn(pairs, 4 * dimensions, generator=generator),
        "y": torch.randn(pairs, 2 * dimensions, generator=generator),
        "inner_lr": torch.tensor(3.5),
    }


def pendulum(**changes) -> dict:
    generator = torch.Generator().manual_seed(0)
    content = {
        "x": torch.randn(8, 4, generator=generator),
        "y_mean": torch.randn(8, 1, generator=generator),
        "y_logstd": torch.tensor([[-2.5]]),
        "inner_lr": torch.tensor(0.8),
    }
    return {"distiller": content | changes}


def frames(pairs: int = 2, actions: int = 18) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(pairs, 4, 84, 84, generator=generator),
        "y": torch.randn(pairs, actions, generator=generator),
        "inner_lr": torch.tensor(0.3),
    }


def convolutions(level: int) -> dict:
    layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()]
    return nn.Sequential(*layers[: 2 * level]).state_dict()


@pytest.fixture
def saved(tmp_path):
    def save(content, name: str = "theirs.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def test_discrete_pairs_are_taken_as_they_are_and_evaluated_like_any_other(saved, tmp_path):
    content = cart_pole()
    dataset = import_released(saved(content), "CartPole2D-v0")
    assert dataset.action_type == "discrete"
    assert torch.equal(dataset.observations, content["x"])
    assert torch.equal(dataset.targets, content["y"])
    assert dataset.learning_rate == 3.5
    assert torch.equal(dataset.normalise(content["x"]), content["x"])
    again = load(dataset.save(tmp_path / "ours.safetensors"))
    before, after = (evaluate(d, learners=4).returns for d in (dataset, again))
    assert torch.equal(before, after)


def test_continuous_log_std_is_what_the_authors_learner_ends_with(saved):
    content = pendulum(y_logstd=torch.tensor([[-2.0]]), inner_lr=torch.tensor(0.9))
    dataset = import_released(saved(content), "InvertedPendulum-v4")
    own = nn.Parameter(torch.zeros(1))
    nn.functional.mse_loss(own, content["distiller"]["y_logstd"][0]).backward()
    torch.optim.SGD([own], lr=0.9).step()
    assert dataset.log_std == pytest.approx(own.detach())
    assert evaluate(dataset, learners=2, env="InvertedPendulum-v5").mean >= 1


def test_log_std_of_several_actions_is_averaged_as_the_loss_is(saved):
    content = {
        "x": torch.randn(4, 17),
        "y_mean": torch.randn(4, 6),
        "y_logstd": torch.linspace(-5, -2, 6)[None],
        "inner_lr": torch.tensor(3.0),
    }
    dataset = import_released(saved({"distiller": content}), "HalfCheetah-v4")
    own = nn.Parameter(torch.zeros(1, 6))
    nn.functional.mse_loss(own, content["y_logstd"]).backward()
    torch.optim.SGD([own], lr=3.0).step()
    torch.testing.assert_close(dataset.log_std, own.detach()[0])


def test_any_floating_type_and_a_one_element_step_size(saved):
    content = cart_pole(1, 2)
    wide = {"x": content["x"].double(), "y": content["y"].half(), "inner_lr": torch.tensor([3.5], dtype=torch.float64)}
    dataset = import_released(saved(wide), "CartPole-v1")
    assert dataset.observations.dtype == dataset.targets.dtype == dataset.learning_rate.dtype == torch.float32
    torch.testing.assert_close(dataset.observations, content["x"])
    assert dataset.learning_rate.shape == ()


def test_a_file_saved_on_a_gpu(saved, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(cart_pole(1, 2))
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert import_released(path, "CartPole-v1").observations.device.type == "cpu"


def test_atari_with_its_encoder(saved, tmp_path):
    path, encoder = saved(frames()), saved(convolutions(2), "encoder.pt")
    plain = import_released(path, "ALE/Centipede-v5")
    assert (plain.encoder_level, plain.encoder) == (0, {})
    dataset = load(import_released(path, "ALE/Centipede-v5", encoder).save(tmp_path / "ours.safetensors"))
    assert dataset.encoder_level == 2
    theirs = torch.load(encoder, weights_only=True)
    assert dataset.encoder.keys() == theirs.keys()
    assert all(torch.equal(dataset.encoder[name], theirs[name]) for name in theirs)
    white = torch.full((4, 84, 84), 255.0)
    assert dataset.normalise(white).eq(1).all()


class RunsCode:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(saved, tmp_path):
    content = cart_pole() | {"inner_lr": RunsCode(tmp_path / "ran")}
    with pytest.raises(DatasetError, match="nothing in it was run"):
        import_released(saved(content), "CartPole2D-v0")
    assert not (tmp_path / "ran").exists()


BAD = {
    "a list": ([torch.zeros(2)], "CartPole-v1", "list"),
    "keys": ({"weights": torch.zeros(2)}, "CartPole-v1", "holds weights; expected x, y, inner_lr"),
    "one too few": ({"x": torch.zeros(2, 4), "y": torch.zeros(2, 2)}, "CartPole-v1", "holds x, y"),
    "one too many": (cart_pole() | {"z": torch.zeros(2)}, "CartPole2D-v0", "holds x, y, inner_lr, z"),
    "not a dict": ({"distiller": torch.zeros(2)}, "Ant-v4", "holds a Tensor"),
    "whole numbers": (cart_pole() | {"y": torch.ones(3, 4, dtype=torch.int64)}, "CartPole2D-v0", "y: .*int64"),
    "no tensor": (cart_pole() | {"inner_lr": 3.5}, "CartPole2D-v0", "inner_lr: float"),
    "sparse": (cart_pole() | {"x": torch.eye(3, 8).to_sparse()}, "CartPole2D-v0", "x: torch.sparse"),
    "NaN": (cart_pole() | {"x": torch.full((3, 8), torch.nan)}, "CartPole2D-v0", "observations: holds NaN"),
    "step size": (cart_pole() | {"inner_lr": torch.tensor(-1.0)}, "CartPole2D-v0", "learning_rate: .*-1"),
    "step sizes": (cart_pole() | {"inner_lr": torch.ones(2)}, "CartPole2D-v0", "learning_rate: shape"),
    "rows": (cart_pole() | {"y": torch.zeros(2, 4)}, "CartPole2D-v0", "3 rows, but targets has 2"),
    "log-std": (pendulum(y_logstd=torch.zeros(1, 3)), "InvertedPendulum-v4", r"y_logstd: shape \[1, 3\]"),
}


@pytest.mark.parametrize(("content", "env", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_not_known_is_refused_in_one_line(saved, content, env, message):
    with pytest.raises(DatasetError, match=message) as refused:
        import_released(saved(content), env)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "env"),
    [
        (cart_pole(2), "CartPole3D-v0"),
        (cart_pole(1), "HalfCheetah-v4"),
        (pendulum(), "CartPole-v1"),
        (frames(), "Ant-v4"),
    ],
)
def test_a_dataset_of_another_environment_is_refused(saved, content, env):
    with pytest.raises(ConfigError, match="needs"):
        import_released(saved(content), env)


def test_encoders_that_do_not_fit_are_refused(saved):
    path = saved(frames())
    for content in ({}, {"0.weight": torch.zeros(32, 4, 8, 8)}, convolutions(2) | {"9.weight": torch.zeros(2)}):
        with pytest.raises(DatasetError, match="Nature CNN"):
            import_released(path, "ALE/Centipede-v5", saved(content, "encoder.pt"))
    wrong = convolutions(1) | {"0.weight": torch.zeros(32, 3, 8, 8)}
    with pytest.raises(DatasetError, match=r"0.weight: shape \[32, 3, 8, 8\]"):
        import_released(path, "ALE/Centipede-v5", saved(wrong, "encoder.pt"))
    encoder = saved(convolutions(1), "encoder.pt")
    with pytest.raises(DatasetError, match="an encoder, but"):
        import_released(saved(cart_pole(), "cartpole.pt"), "CartPole2D-v0", encoder)


def test_the_estimated_normaliser_is_that_of_what_taught_learners_see(saved):
    dataset = import_released(saved(pendulum()), "InvertedPendulum-v4")
    estimated, taken = estimate_normaliser(dataset, 1000)
    assert taken == 1008  # 63 steps of 16 learners
    assert torch.equal(estimated.observations, dataset.observations)
    assert estimated.observation_mean.abs().max() < 1
    # Poles fall within a few steps: positions stay small, velocities are larger.
    assert (estimated.observation_std[:2] < 0.3).all()
    assert (estimated.observation_std[2:] > estimated.observation_std[:2]).all()
    assert estimate_normaliser(dataset, 1000)[0].observation_std.equal(estimated.observation_std)
    assert not estimate_normaliser(dataset, 1000, seed=1)[0].observation_std.equal(estimated.observation_std)


def test_import_from_the_shell(saved, tmp_path, capsys):
    output = tmp_path / "new" / "ours.safetensors"
    options = ["--env", "InvertedPendulum-v4", "--normaliser_steps", "160", "--seed", "3", "--evaluate", "3", "--json"]
    main(["import", str(saved(pendulum())), "-o", str(output), *options])
    told = json.loads(capsys.readouterr().out)
    dataset = load(output)
    assert told["path"] == str(output)
    assert told["normaliser_steps"] == 160
    assert told["returns"] == dataset.metadata["returns"]
    entry = told["returns"]["in-distribution"]["sampled"]
    assert entry["learners"] == 3
    assert entry["mean"] == pytest.approx(evaluate(dataset, learners=3).mean)
    assert dataset.metadata["command"] == (
        "lightning-distill import theirs.pt --env InvertedPendulum-v4 -o ours.safetensors --normaliser_steps 160 --seed 3 "
        "--evaluate 3"
    )
    assert str(tmp_path) not in repr(dataset.metadata)


def test_pairs_of_observations_as_they_are_get_no_normaliser(saved, tmp_path, capsys):
    output = tmp_path / "ours.safetensors"
    with pytest.raises(SystemExit):
        main(
            [
                "import",
                str(saved(cart_pole())),
                "--env",
                "CartPole2D-v0",
                "-o",
                str(output),
                "--normaliser_steps",
                "160",
            ]
        )
    assert "normaliser_steps=160: " in capsys.readouterr().err
    assert not output.exists()
