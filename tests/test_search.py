"""The search for the smallest dataset: real runs, kept short."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_nothing_is_lost import env_steps, wait_for

from lightning_distill.cli import main
from lightning_distill.dataset import load
from lightning_distill.envs import ConfigError
from lightning_distill.search import smallest

SHORT = [
    "data.env_steps=60000",
    "data.val_learners=4",
    "data.test_learners=10",
    "trainer.val_check_interval=1.0",
    "held_out.families=[]",
    "trainer.logger=false",
    "trainer.enable_progress_bar=false",
    "report.pictures=false",
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {env: CartPole-v1, num_envs: 64, rollout_length: 50}\nmodel: {pairs: 9}\n")
    return str(path)


def test_least_number_of_pairs_that_suffices(config, tmp_path, capsys, monkeypatch):
    arguments = ["search", config, "--pairs", "2", "1", "--level", "30", "--output", str(tmp_path / "out"), "--json"]
    main([*arguments, "--option", *SHORT])
    answer = json.loads(capsys.readouterr().out)
    tried = [run["pairs"] for run in answer["runs"]]
    assert tried == ([1] if answer["smallest"] == 1 else [1, 2]), "smaller numbers come first, and then no more"
    last = answer["runs"][-1]
    assert last["pairs"] == answer["smallest"]
    assert last["mean"] >= 30
    assert load(last["path"]).pairs == answer["smallest"]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    table = importlib.import_module("pairs").table([tmp_path / "out"])
    assert [int(row.split("|")[2]) for row in table.splitlines()[2:]] == tried
    with pytest.raises(SystemExit, match="no finished run"):
        importlib.import_module("pairs").table([tmp_path])
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    main([*arguments, "--level", "31", "--option", *SHORT, "data.env_steps=60000"])
    again = json.loads(capsys.readouterr().out)
    assert again["runs"][: len(tried)] == answer["runs"], "what has finished is not run again"
    assert written.items() <= {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}.items()


def test_a_share_of_a_loss_says_nothing_and_its_run_is_kept(tmp_path):
    config = tmp_path / "pendulum.yaml"
    config.write_text("data: {env: Pendulum-v1, num_envs: 8, rollout_length: 32, env_steps: 256}\nmodel: {pairs: 1}\n")
    options = [f"--{option}" for option in SHORT[1:]]
    with pytest.raises(
        ConfigError, match=r"share=0.9 of a return of -.*distilled\.safetensors.* give a level \(--level=-"
    ):
        smallest(str(config), [2], None, 0.9, tmp_path, options)
    (path,) = tmp_path.rglob("distilled.safetensors")
    content = path.read_bytes()
    found, trials, level = smallest(str(config), [2], -1e4, 0.9, tmp_path, options)
    assert (found.path, level, len(trials)) == (path, -1e4, 1)
    assert path.read_bytes() == content


def test_a_search_that_is_told_to_end_goes_on(config, tmp_path):
    """Its run saves first, and is not left alone; the same search goes on from there, without loggers, which number runs, too."""
    options = [option for option in SHORT if not option.startswith("data.env_steps")]
    options += ["data.env_steps=60000", "last_checkpoint.minutes=1e-9"]
    command = ["search", config, "--pairs", "2", "--level", "30", "-o", str(tmp_path / "out"), "--option", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "lightning_distill.cli", *command]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    last = tmp_path / "out" / "pairs_2" / "start_0" / "checkpoints" / "last.ckpt"
    wait_for(last.is_file, process)
    process.terminate()
    assert "the run with 2 pairs failed" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    saved, stopped_at = last.stat().st_mtime, env_steps(last)
    assert 0 < stopped_at < 60_000
    found, *_ = smallest(config, [2], 30.0, 0.9, tmp_path / "out", [f"--{option}" for option in options])
    assert last.stat().st_mtime == saved, "the run that was stopped has ended with its search"
    assert found.path.is_relative_to(tmp_path / "out" / "pairs_2" / "start_1")
    assert found.dataset.metadata["env_steps"] > stopped_at
    assert (
        f"Restored all states from the checkpoint at {last}" in (tmp_path / "out" / "pairs_2" / "fit.log").read_text()
    )


def test_a_run_that_fails_is_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"run with 3 pairs failed.*fit\.log.*NoSuchEnv"):
        smallest(config, [3], 1.0, 0.9, tmp_path, ["--data.env=NoSuchEnv-v0"])


def test_a_config_that_is_not_there_is_named_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"nope.yaml.*no such file"):
        smallest("nope.yaml", [2], 1.0, 0.9, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.pairs=4", "option model.pairs: allowed is --pairs"),
        ("--trainer.limit_test_batches=0", "trainer.limit_test_batches=0: allowed is to leave it out"),
        ("--model=PPO", "Option 'model.pairs' is not accepted by lightning_distill.PPO"),
        ("--model.pears=4", "Option 'model.pears' is not accepted"),
    ],
)
def test_options_that_no_search_can_have_are_named_before_any_run(config, tmp_path, option, message):
    with pytest.raises(ConfigError, match=message):
        smallest(config, [2], 1.0, 0.9, tmp_path / "out", [option])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pairs", "share"), [([], 0.9), ([0, 2], 0.9), ([2], 0.0), ([2], 1.5)])
def test_arguments_out_of_range(config, tmp_path, pairs, share):
    with pytest.raises(ConfigError, match="allowed"):
        smallest(config, pairs, None, share, tmp_path)
    assert not list(tmp_path.glob("pairs_*"))
