"""The commands as users type them, each in a process of its own or through the same entry point."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_distill import MetaPPO, load
from lightning_distill.cli import main

CONF = Path(__file__).parents[1] / "conf"
QUICK = [
    "--data.env_steps=8_000",
    "--data.num_envs=32",
    "--data.rollout_length=50",
    "--data.val_learners=4",
    "--data.test_learners=8",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def lightning(*args, monkeypatch, **kwargs):
    monkeypatch.setattr(sys, "argv", ["lightning", *map(str, args)])
    main(**kwargs)


def refused(capsys, monkeypatch, *args):
    """The message of a call that must fail, and fail soon."""
    with pytest.raises(SystemExit) as exit_:
        lightning(*args, monkeypatch=monkeypatch)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the main job, W&B and all, typed at a shell."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "lightning_distill.cli", "fit", f"--config={CONF / 'cartpole_1d.yaml'}", *QUICK]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_run_leaves_all_it_promises(finished):
    folder, output = finished
    run = folder / "runs" / "CartPole-v1" / "version_0"
    for name in (
        "distilled.safetensors",
        "last.safetensors",
        "metrics.csv",
        "config.yaml",
        "pairs.png",
        "learning_curve.png",
    ):
        assert (run / name).stat().st_size > 0, name
        assert name in output
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((folder / "runs" / "wandb").glob("offline-run-*")), "nobody is logged in: offline, and no prompt"
    for family in ("in-distribution", "width_256", "depth_1", "relu"):
        assert family in output


def test_exported_dataset_says_where_it_comes_from(finished):
    dataset = load(finished[0] / "runs" / "CartPole-v1" / "version_0" / "distilled.safetensors")
    assert (dataset.env, dataset.pairs, dataset.outputs) == ("CartPole-v1", 2, 2)
    returns = dataset.metadata["returns"]["in-distribution"]
    assert {kind: entry["learners"] for kind, entry in returns.items()} == {"sampled": 8, "greedy": 8}
    assert yaml.safe_load(dataset.metadata["config"])["fit"]["model"]["pairs"] == 2
    assert 1600 <= dataset.metadata["env_steps"] <= 8000


def test_metrics_hold_returns_beside_steps(finished):
    with (finished[0] / "runs" / "CartPole-v1" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [float(row["env_steps"]) for row in rows if row["env_steps"]]
    assert steps == [1600.0 * i for i in range(1, 6)]
    assert len([row for row in rows if row["val/return"]]) == 5
    assert float(rows[0]["policy/learning_rate"]) > 0


def test_a_checkpoint_is_a_model_without_running_code(finished):
    path = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    module = MetaPPO.load_from_checkpoint(path, weights_only=True)
    assert module.synthetic_batch.pairs == 2
    assert torch.load(path, weights_only=True)["env"]["id"] == "CartPole-v1"


def test_a_run_goes_on_from_its_checkpoint_and_the_first_stays_whole(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.chdir(folder)
    first = folder / "runs" / "CartPole-v1" / "version_0"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    last = first / "checkpoints" / "last.ckpt"
    options = [*QUICK[1:], "--data.env_steps=16_000", f"--ckpt_path={last}"]
    lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    with (folder / "runs" / "CartPole-v1" / "version_1" / "metrics.csv").open(newline="") as file:
        steps = [float(row["env_steps"]) for row in csv.DictReader(file) if row["env_steps"]]
    assert steps == [1600.0 * i for i in range(6, 11)]
    assert before == {path: path.read_bytes() for path in before}
    lightning("validate", "--config", CONF / "cartpole_1d.yaml", *QUICK, f"--ckpt_path={last}", monkeypatch=monkeypatch)
    assert "val/return" in capsys.readouterr().out


def test_checkpoint_of_another_environment_is_refused(finished, capsys, monkeypatch, here):
    last = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    message = refused(capsys, monkeypatch, "fit", "--config", CONF / "halfcheetah.yaml", f"--ckpt_path={last}")
    assert "CartPole-v1" in message
    assert "HalfCheetah-v5" in message


EXPERIMENTS = sorted(path for path in CONF.rglob("*.yaml") if "sweeps" not in path.parts)


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_shipped_config_runs(config, here, monkeypatch):
    lightning(
        "fit", "--config", config, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", monkeypatch=monkeypatch
    )
    assert not list(here.rglob("*.safetensors")), "a development run leaves nothing behind"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.env=Foo-v9"], ["data.env", "Foo-v9"]),
        (["--data.env=Blackjack-v1"], ["Blackjack-v1", "observation space", "Box"]),
        (["--model.family=nope"], ["family", "nope", "relu"]),
        (["--held_out.families=[nope]"], ["family", "nope", "relu"]),
        (["--held_out.families={mine: torch.nn.ReLU}"], ["held_out.families", "mine"]),
        (["--model.pairs=0"], ["model.pairs", "0", ">0"]),
        (["--data.num_envs=-3"], ["data.num_envs", "-3"]),
        (["--data.num_envs=30"], ["data.num_envs=30", "model.learners=8"]),
        (["--model.pears=3"], ["model.pears"]),
        (["--model.gamma=1.5"], ["model.gamma", "1.5"]),
        (["--config=missing.yaml"], ["missing.yaml"]),
        (["--trainer.default_root_dir=/proc/nowhere"], ["trainer.default_root_dir", "/proc/nowhere"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_named_at_once(options, words, capsys, monkeypatch, here):
    message = refused(capsys, monkeypatch, "fit", "--config", CONF / "cartpole_1d.yaml", *options)
    for word in words:
        assert word in message


def test_misspelt_key_in_a_config_file_is_named(capsys, monkeypatch, here):
    Path("typo.yaml").write_text("data: {env: CartPole-v1}\nmodel: {pears: 2}\n")
    assert "pears" in refused(capsys, monkeypatch, "fit", "--config=typo.yaml")


def test_interpolation_sees_what_the_command_line_says(capsys, monkeypatch, here):
    Path("mine.yaml").write_text("data: {env: Ant-v5}\ntrainer: {default_root_dir: 'runs/${data.env}'}\n")
    with pytest.raises(SystemExit) as exit_:
        lightning("fit", "--config=mine.yaml", "--data.env=Ant-v4", "--print_config", monkeypatch=monkeypatch)
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["default_root_dir"] == "runs/Ant-v4"
    assert printed["trainer"]["logger"][0]["init_args"]["name"] == "Ant-v4"


def test_help_needs_no_simulator():
    code = (
        "import sys; from lightning_distill.cli import main\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torchrl', 'gymnasium', 'mujoco', 'envpool'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--model.pairs" in done.stdout
