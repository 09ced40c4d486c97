"""Pipelines: real runs, kept short."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_nothing_is_lost import logged_steps, wait_for

from lightning_distill.cli import main
from lightning_distill.dataset import load
from lightning_distill.envs import ConfigError
from lightning_distill.pipeline import finished_run, run_pipeline

ROOT = Path(__file__).parents[1]
SHORT = "--data.num_envs=8 --data.rollout_length=32 --data.val_learners=2 --data.test_learners=2 --trainer.val_check_interval=1.0"
STAGES = f"""\
expert: {SHORT} --data.env=CartPole-v1 --data.env_steps=512 --model=PPO
student: >-
  {SHORT} --data.env=CartPole-v1 --data.env_steps=512 --model=lightning_distill.imitation.Imitation --model.pairs=3
  --model.expert=${{expert}}/checkpoints/last.ckpt
"""
OPTIONS = ["trainer.enable_progress_bar=false", "report.pictures=false", "held_out.families=[]", "seed_everything=3"]


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content):
        path = tmp_path / "both.yaml"
        path.write_text(content)
        return str(path)

    return write


def test_a_stage_begins_with_what_the_one_before_wrote_and_is_not_run_twice(pipeline, capfd):
    arguments = ["pipeline", pipeline(STAGES), "--json", "--option", *OPTIONS]
    main(arguments)
    runs = json.loads(capfd.readouterr().out)
    assert list(runs) == ["expert", "student"]
    dataset = load(Path(runs["student"]) / "distilled.safetensors")
    assert dataset.pairs == 3
    assert dataset.metadata["seed"] == 3
    config = yaml.safe_load((Path(runs["student"]) / "config.yaml").read_text())
    assert config["model"]["init_args"]["expert"] == f"{runs['expert']}/checkpoints/last.ckpt"
    before = set(Path("runs").rglob("version_*"))
    main(arguments)
    assert json.loads(capfd.readouterr().out) == runs
    assert set(Path("runs").rglob("version_*")) == before


def test_a_stage_with_other_options_is_a_run_of_its_own(pipeline, monkeypatch):
    """Not the finished run, which has no steps left, under another name; nor where it was killed before it had learned anything."""
    path = pipeline(STAGES.partition("student")[0])
    folders = []
    for rollout_length in (32, 32, 16):
        main(["pipeline", path, "-o", "out", "--option", *OPTIONS, "--option", f"data.rollout_length={rollout_length}"])
        folders.append(Path(json.loads(Path("out/expert/finished.json").read_text())["folder"]))
    assert folders[0] == folders[1] != folders[2]
    config = yaml.safe_load((folders[2] / "config.yaml").read_text())
    assert config["data"]["rollout_length"] == 16
    assert config["seed_everything"] == 3  # two ``--option`` add up
    assert logged_steps(folders[2]) == [128, 256, 384, 512]
    shorter = ["pipeline", path, "-o", "out", "--option", *OPTIONS, "data.rollout_length=16", "data.env_steps=256"]
    with monkeypatch.context() as killed:
        killed.setattr("subprocess.Popen", lambda *_, **__: sys.exit(9))
        with pytest.raises(SystemExit):
            main(shorter)
    for _ in range(2):
        main(shorter)
        run = Path(json.loads(Path("out/expert/finished.json").read_text())["folder"])
        assert logged_steps(run) == [128, 256]
        shutil.rmtree(run)  # somebody makes room: there is nothing that later stages could begin with


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "allowed are lines NAME: OPTIONS"),
        ("a: {b: c}", "allowed are lines NAME: OPTIONS"),
        ("1: --data.env=CartPole-v1", "names of letters, digits and _"),
        ("a-b: --data.env=CartPole-v1", "names of letters, digits and _"),
        ("a: [", "not YAML"),
        ("a: --data.env='CartPole-v1", "stage 'a': No closing quotation"),
        ("a: --data.env=$", "stage 'a': Invalid placeholder"),
        (
            "a: --model.start=${b}/x\nb: --data.env=CartPole-v1",
            "stage 'a' speaks of 'b'; allowed are earlier stages: none",
        ),
        (f"a: --data.env=CartPole-v1\nb: {SHORT} --model.pears=3", r"stage 'b': .*pears"),
        ("a: --model.pairs=3", "stage 'a': data.env: not given"),
        (
            "a: --data.env=CartPole-v1 --trainer.enable_checkpointing=false",
            "enable_checkpointing=False: allowed is true",
        ),
        (
            "a: [--data.env=CartPole-v1, --data.env=CartPole-v1 --seed_everything=4294967000]",
            "stage 'a': seed_everything=4294968000: allowed",
        ),
        (
            "a: [--data.env=CartPole-v1, --data.env=CartPole-v1 --trainer.limit_val_batches=0]",
            "stage 'a': .*limit_val_batches",
        ),
        ("a: []", r"allowed are lines NAME: OPTIONS .* or NAME: \[OPTIONS"),
        ("a: [--data.env=CartPole-v1, 3]", r"allowed are lines NAME: OPTIONS .* or NAME: \[OPTIONS"),
        ("a: --data.env=CartPole-v1\nb: --data.env=CartPole-v7", "stage 'b': data.env='CartPole-v7'"),
        ("a: --data.env=CartPole-v1\nb: --data.env=CartPole-v1 --model.family=nosuch", "stage 'b': family='nosuch'"),
        (
            "a: --data.env=CartPole-v1\nb: --data.env=CartPole-v1 --held_out.families=[nosuch]",
            "stage 'b': family='nosuch'",
        ),
        (
            "a: --data.env=CartPole-v1\nb: --data.env=CartPole-v1 --model.start=cartpole_1e",
            "stage 'b': model.start='cartpole_1e': .*no such file.* did you mean cartpole_1d",
        ),
        (
            "a: --data.env=CartPole-v1\nb: --data.env=CartPole-v1 --model.start=${a}/distiled.safetensors",
            r"stage 'b': model\.start='distiled\.safetensors' of an earlier stage.*: allowed of it are distilled\.safetensors",
        ),
        (
            "a: --data.env=CartPole-v1 --model=PPO\nb: --data.env=CartPole-v1 --model.start=${a}/distilled.safetensors",
            r"stage 'b': model\.start='distilled\.safetensors' of an earlier stage, by .*PPO: allowed of it are none",
        ),
        (
            "a: --data.env=CartPole-v1\nb: --data.env=Acrobot-v1 --model.start=${a}/distilled.safetensors",
            r"stage 'b': model\.start=.* in CartPole-v1, .*\(4,\).*data\.env='Acrobot-v1' has \(\(6,\)",
        ),
        (
            f"{STAGES}  --model.learners=16",
            r"stage 'student': data\.num_envs=8: allowed are multiples of model\.learners=16",
        ),
        (
            f"a: {SHORT} --data.env=CartPole-v1 --model.minibatches=1000",
            r"stage 'a': model\.minibatches=1000: a rollout has 32 samples",
        ),
        (
            "a: --data.env=CartPole-v1 --model.optimizer.lr=-1",
            r"stage 'a': model\.optimizer: .*-1",
        ),
    ],
)
def test_what_is_no_pipeline_is_named_before_anything_runs(pipeline, tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        run_pipeline(pipeline(content), tmp_path / "out")
    assert not list(tmp_path.rglob("version_*"))


def test_a_run_that_fails_is_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("fails.py").write_text(
        "import lightning as L\n\nclass Fails(L.Callback):\n    def on_train_start(self, *_):\n        raise OSError"
    )
    path = pipeline(f"a: {SHORT} --data.env=CartPole-v1 --trainer.callbacks+=fails.Fails")
    with pytest.raises(ConfigError, match="stage 'a' ended with exit code 1"):
        run_pipeline(path, tmp_path / "out")


OWN = """
import lightning_distill.experts


class Own(lightning_distill.experts.TrainedPolicy):
    def __init__(self, spec, path):
        super().__init__(path, spec)
"""


def test_looking_at_runs_leaves_the_process_as_it_was_and_waits_for_what_is_not_yet_there(
    pipeline, tmp_path, monkeypatch
):
    """An expert with arguments is of an earlier stage, too; that is seen when it is made."""
    (tmp_path / "own_of_pipeline.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    expert = "own_of_pipeline.Own --model.expert.path=${expert}/checkpoints/last.ckpt"
    path = pipeline(
        STAGES.replace("${expert}/checkpoints/last.ckpt", expert).replace(
            "512 --model=PPO", "512 --model=PPO --trainer.deterministic=true"
        )
    )
    begun = []
    monkeypatch.setattr(
        "lightning_distill.pipeline.finished_run", lambda name, *_: begun.append(name) or tmp_path / name
    )
    before = (
        dict(os.environ),
        torch.get_rng_state(),
        torch.are_deterministic_algorithms_enabled(),
        list(warnings.filters),
    )
    logging.disable(logging.DEBUG)
    run_pipeline(path, tmp_path / "out")
    assert logging.root.manager.disable == logging.DEBUG
    logging.disable(logging.NOTSET)
    after = (
        dict(os.environ),
        torch.get_rng_state(),
        torch.are_deterministic_algorithms_enabled(),
        list(warnings.filters),
    )
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert begun == ["expert", "student"]


def test_a_pipeline_that_is_told_to_end_begins_no_further_run(pipeline, tmp_path, monkeypatch):
    """Its run was at its end just then."""

    class Ends:
        def __init__(self, command, **_):
            root = Path(command[-1].removeprefix("--trainer.default_root_dir="))
            last = root / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
            last.parent.mkdir(parents=True)
            last.touch()

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return 0

        def terminate(self):
            terminated.append(self)

    terminated, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("lightning_distill.pipeline.subprocess", SimpleNamespace(Popen=Ends, DEVNULL=None))
    with pytest.raises(SystemExit) as ended:
        run_pipeline(pipeline(STAGES), tmp_path / "out")
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(terminated) == 1
    assert [path.parent.name for path in (tmp_path / "out").rglob("finished.json")] == ["expert"]
    assert not (tmp_path / "out" / "student").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_outlives_its_parent_is_not_run_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, does in (("lasts", "touch begun; sleep 100"), ("ends", "exit 3")):
        Path(name).write_text(f"#!/bin/sh\n{does}\n")
        Path(name).chmod(0o755)
    run = ["--data.env=CartPole-v1", *SHORT.split()]
    code = (
        "import sys; from pathlib import Path; from lightning_distill import pipeline\n"
        f"sys.executable = './lasts'; pipeline.finished_run('a', {run}, Path('out'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        wait_for(Path("begun").exists, parent)
        parent.kill()
        parent.wait()
        monkeypatch.setattr(sys, "executable", "./ends")
        with pytest.raises(ConfigError, match="'out': a run of this place is still going on"):
            finished_run("a", run, Path("out"))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while "still going on" in (said := _refusal(run)) and time.monotonic() < until:
        time.sleep(0.1)
    assert said.startswith("stage 'a' ended with exit code 3")


def _refusal(run):
    with pytest.raises(ConfigError) as refused:
        finished_run("a", run, Path("out"))
    return str(refused.value)


def test_of_several_runs_of_a_stage_the_best_by_validation_goes_on(pipeline, tmp_path, capfd):
    """One learns nothing: its steps are too small."""
    run = f"{SHORT} --data.env=CartPole-v1 --data.val_learners=20 --data.env_steps="
    nothing = "1024 --model.optimizer=torch.optim.Adam --model.optimizer.lr=1e-9"
    path = pipeline(
        f"gait:\n- {run}{nothing}\n- {run}40_000 --data.num_envs=64\n"
        f"after: {run}512 --model.start=${{gait}}/distilled.safetensors\n"
    )
    options = [f"--{option}" for option in OPTIONS]
    runs = run_pipeline(path, tmp_path / "out", options)
    seeds = [load(next((tmp_path / "out" / "gait" / k).rglob("last.safetensors"))).metadata["seed"] for k in "12"]
    assert seeds == [3, 1003]
    assert runs["gait"].is_relative_to(tmp_path / "out" / "gait" / "2")
    config = yaml.safe_load((runs["after"] / "config.yaml").read_text())
    assert config["model"]["init_args"]["start"] == str(runs["gait"] / "distilled.safetensors")
    assert f"going on with {runs['gait']}" in capfd.readouterr().out
    before = set(tmp_path.rglob("version_*"))
    assert run_pipeline(path, tmp_path / "out", options) == runs
    assert set(tmp_path.rglob("version_*")) == before


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "pipelines").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_shipped_pipeline_can_begin(path, tmp_path, monkeypatch):
    def begin(name, *_):
        begun.append(name)
        raise KeyboardInterrupt

    begun = []
    monkeypatch.setattr("lightning_distill.pipeline.finished_run", begin)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(str(path), tmp_path)
    assert begun[0].partition("/")[0] == next(iter(yaml.safe_load(path.read_text()))), "after all were looked at"
