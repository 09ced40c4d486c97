"""On a GPU: what a CPU computes, and every kind of run from its first step to the file it writes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_distill import NatureCNN, evaluate, load, teach, teach_many
from lightning_distill.cli import main
from lightning_distill.families import FAMILIES
from lightning_distill.teaching import with_encoder_level

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CONF = Path(__file__).parents[1] / "conf"
FIT = [
    "--data.num_envs=8",
    "--data.rollout_length=16",
    "--data.val_learners=2",
    "--data.test_learners=2",
    "--trainer.accelerator=gpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=runs",
]
DISTIL = [*FIT, "--held_out.families=[]", "--report.pictures=false"]
GAME = ["--model.learners=2", "--data.env_kwargs.max_num_frames_per_episode=400"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(config, env_steps, *options):
    main(["fit", f"--config={CONF / config}", f"--data.env_steps={env_steps}", *options])


def perceptron(entries, actions):
    return nn.Sequential(nn.Linear(entries, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, actions))


def convolutional(actions):
    layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, actions))


def outputs_on_both(module, dataset, rule, observations):
    """Of the same module taught on the CPU and on the GPU, as [2, B, d] on the CPU."""
    both = [
        teach(copy.deepcopy(module).to(device), dataset, rule).output(observations.to(device)).cpu()
        for device in ("cpu", "cuda")
    ]
    return torch.stack(both).detach()


@pytest.mark.parametrize(
    ("name", "rule"), [("halfcheetah_plain", "sgd"), ("halfcheetah", "newton"), ("halfcheetah", "projection")]
)
def test_a_step_is_what_it_is_on_a_cpu(name, rule):
    torch.manual_seed(0)
    dataset = load(name)
    observations = dataset.observation_mean + dataset.observation_std * torch.randn(64, 17)
    cpu, gpu = outputs_on_both(perceptron(17, 6), dataset, rule, observations)
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_any_module_is_taught_here(name):
    torch.manual_seed(0)
    taught = teach_many(FAMILIES[name], load("halfcheetah"), 3, device="cuda")
    assert taught.output(torch.randn(3, 8, 17, device="cuda")).isfinite().all()


def test_frames_teach_as_on_a_cpu():
    torch.manual_seed(0)
    dataset = with_encoder_level(load("centipede_l2"), 0, NatureCNN())
    frames = torch.randint(256, (8, 4, 84, 84)).float()
    # TensorFloat-32, with which convolutions are computed otherwise, has ten bits of mantissa.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        cpu, gpu = outputs_on_both(convolutional(18), dataset, "sgd", frames)
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-3 * cpu.abs().max().item())


@pytest.mark.parametrize(
    ("config", "env_steps", "options"),
    [
        ("cartpole_2d.yaml", 256, []),
        ("cartpole_2d.yaml", 256, ["--model.step_rule=newton"]),
        ("cartpole_2d.yaml", 256, ["--model.step_rule=line_search"]),
        ("cartpole_2d.yaml", 256, ["--model.compile=true"]),
        ("halfcheetah.yaml", 256, ["--data.backend=gymnasium"]),
        ("general/halfcheetah.yaml", 512, ["--data.num_envs=16", "--data.backend=gymnasium"]),
        (
            "steady/halfcheetah.yaml",
            512,
            ["--model.expert=halfcheetah_plain", "--data.num_envs=16", "--data.backend=gymnasium"],
        ),
        (
            "cartpole_1d.yaml",
            256,
            ["--model=lightning_distill.imitation.Imitation", "--model.expert=test_imitation.Balance"],
        ),
        ("atari/pong.yaml", 256, [*GAME, "--model.encoder_level=0"]),
        ("atari/pong.yaml", 256, [*GAME, "--model.encoder_level=2", "--model.start=pong_l4"]),
        ("atari/pong.yaml", 256, [*GAME, "--model.encoder_level=4", "--trainer.precision=32-true"]),
        ("atari/pong.yaml", 256, [*GAME, "--model.encoder_level=4", "--model.encoded_pairs=true"]),
        ("atari/pong.yaml", 256, [*GAME, "--model.step_rule=newton", "--model.pairs=8", "--model.encoder_level=0"]),
        ("atari/pong.yaml", 256, ["--model=lightning_distill.imitation.Imitation", *GAME, "--model.expert=pong_l4"]),
    ],
)
def test_a_dataset_distilled_here_is_for_any_machine(here, config, env_steps, options):
    fit(config, env_steps, *DISTIL, *options)
    (path,) = here.rglob("distilled.safetensors")
    dataset = load(path)
    assert dataset.observations.device.type == "cpu"
    assert dataset.observations.isfinite().all()
    assert dataset.targets.isfinite().all()
    assert dataset.metadata["returns"]["in-distribution"]["sampled"]["learners"] == 2


def test_a_run_goes_on_here_and_on_a_cpu(here):
    fit("cartpole_1d.yaml", 256, *DISTIL)
    fit("cartpole_1d.yaml", 512, *DISTIL, "--ckpt_path=last")
    fit("cartpole_1d.yaml", 768, *DISTIL, "--ckpt_path=last", "--trainer.accelerator=cpu")
    newest = max(here.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    assert int(torch.load(newest, weights_only=True, map_location="cpu")["state_dict"]["env_steps"]) == 768


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("ppo/halfcheetah.yaml", ["--data.backend=gymnasium"]),
        ("ppo/atari/breakout.yaml", ["--data.env_kwargs.max_num_frames_per_episode=400"]),
    ],
)
def test_direct_rl(here, config, options):
    fit(config, 256, *FIT, *options)
    assert "test/return_sampled" in next(here.rglob("metrics.csv")).read_text()


def test_everything_that_a_run_shows(here):
    """Held-out architectures, controls, pictures and the report."""
    fit("cartpole_1d.yaml", 256, *FIT)
    (path,) = here.rglob("distilled.safetensors")
    assert len(load(path).metadata["returns"]) > 5


def test_evaluation_gives_what_it_gives_on_a_cpu():
    """As taught policies do the same; draws of actions and learners are the device's own."""
    here, there = (evaluate(load("cartpole_1d"), learners=16, device=device) for device in ("cpu", "cuda"))
    assert here.mean > 480
    assert there.mean > 480
