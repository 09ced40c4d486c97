"""Runs that are killed, stopped, or break: what is on the disk is whole, and goes on."""

import copy
import csv
import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import probes  # noqa: F401  registers the probe environments
import pytest
import torch
import yaml
from handmade import make_dataset
from test_meta_ppo import prepared, small_run, trainer

import lightning_distill.dataset
from lightning_distill import CollectorDataModule, ConfigError, MetaPPO, load
from lightning_distill.callbacks import ExportDataset
from lightning_distill.checkpoints import AtomicCheckpointIO, RunCheckpoint, last_checkpoint
from lightning_distill.checks import check_family
from lightning_distill.cli import main
from lightning_distill.data import Rollouts
from lightning_distill.loggers import RunFolder
from lightning_distill.optimizing import clipped_step

CONF = Path(__file__).parents[1] / "conf"
FIT = [
    "fit",
    f"--config={CONF / 'cartpole_1d.yaml'}",
    "--data.num_envs=32",
    "--data.rollout_length=20",
    "--data.val_learners=2",
    "--data.test_learners=2",
    "--held_out.families=[]",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--report.pictures=false",
]
#: A checkpoint after every iteration.
OFTEN = "--last_checkpoint.minutes=1e-9"
BREAKS = [*FIT, "--data.env=ProbeBreaks-v0", "--data.num_envs=8", "--data.env_steps=100_000", OFTEN]


def fit(*options):
    main([*FIT, *options])


def started(folder, *options):
    command = [sys.executable, "-m", "lightning_distill.cli", *FIT, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.05)


def env_steps(checkpoint):
    return int(torch.load(checkpoint, weights_only=True)["state_dict"]["env_steps"])


def logged(run, name):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def logged_steps(run):
    return logged(run, "env_steps")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_terminated_and_killed_runs_go_on_from_last(here):
    """SIGTERM before the first validation; the resumed run is killed by −9; the next one ends."""
    runs = [here / "runs" / "CartPole-v1" / f"version_{index}" for index in range(3)]
    last = [run / "checkpoints" / "last.ckpt" for run in runs]
    long = ["--data.env_steps=100_000_000", "--ckpt_path=last", OFTEN]

    first = started(here, *long)
    wait_for(last[0].exists, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert env_steps(last[0]) > 0
    for name in ("last", "distilled"):
        assert load(runs[0] / f"{name}.safetensors").metadata["env_steps"] == env_steps(last[0])

    second = started(here, *long)
    wait_for(last[1].exists, second)
    second.kill()
    second.wait(60)
    assert env_steps(last[1]) > env_steps(last[0])

    fit("--ckpt_path=last", f"--data.env_steps={env_steps(last[1]) + 3 * 640}")
    assert logged_steps(runs[2]) == [env_steps(last[1]) + i * 640 for i in (1, 2, 3)]
    assert load(runs[2] / "distilled.safetensors").metadata["returns"]


TESTING = """
import time
import lightning as L


class Testing(L.Callback):
    def on_test_epoch_start(self, *_):
        open("testing", "w").close()
        time.sleep(60)
"""


def test_a_run_that_is_told_to_end_in_its_test_ends_and_is_not_lost(here):
    Path("testing.py").write_text(TESTING)
    run = started(here, "--data.env_steps=1280", "--trainer.callbacks+=testing.Testing")
    wait_for((here / "testing").exists, run)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 40
    [last] = here.rglob("last.ckpt")
    assert env_steps(last) == 1280
    fit("--data.env_steps=1280", "--ckpt_path=last")
    assert load(next((here / "runs").rglob("version_1/distilled.safetensors"))).metadata["returns"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_processes_save_together(here, number):
    run = here / "runs" / "CartPole-v1" / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    both = started(here, "--data.env_steps=100_000_000", "--trainer.devices=2", OFTEN)
    wait_for(last.exists, both)
    both.send_signal(number)
    assert both.wait(60) == 128 + signal.SIGTERM
    assert load(run / "last.safetensors").metadata["env_steps"] == env_steps(last) > 0
    assert not load(run / "last.safetensors").metadata["returns"], "those of a validation before are not of these pairs"


def test_last_is_the_newest_of_the_same_config(tmp_path):
    mine = {
        "seed_everything": 1,
        "data": {"env": "A-v0", "env_kwargs": None, "env_steps": 5},
        "model": {"pairs": 2, "x": None},
    }
    others = [{**mine, "seed_everything": 2}, {**mine, "model": {"pairs": 3}}, {**mine, "data": {"env": "B-v0"}}]
    longer = {**mine, "data": {"env": "A-v0", "env_steps": 9}, "model": {"pairs": 2}}
    assert last_checkpoint(tmp_path, mine) is None
    for age, config in enumerate([longer, mine, *others]):
        path = tmp_path / "run" / f"version_{age}" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
        (path.parents[1] / "config.yaml").write_text(yaml.safe_dump(config))
        assert (
            last_checkpoint(tmp_path, mine) == tmp_path / "run" / f"version_{min(age, 1)}" / "checkpoints" / "last.ckpt"
        )


def make_unbeatable(last):
    """As if the best so far were better than whatever comes next."""
    checkpoint = torch.load(last, weights_only=True)
    key = next(key for key in checkpoint["callbacks"] if "'val/return'" in key)
    state = checkpoint["callbacks"][key]
    state["best_model_score"] = torch.tensor(1e6)
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(1e6))
    checkpoint["callbacks"]["ExportDataset"]["best_return"] = 1e6
    torch.save(checkpoint, last)


def test_best_so_far_comes_along(here):
    fit("--data.env_steps=6_400")
    first, second = (here / "runs" / "CartPole-v1" / f"version_{index}" for index in (0, 1))
    # The resumed run must keep both, in its own folder.
    make_unbeatable(first / "checkpoints" / "last.ckpt")
    best, dataset = (first / "checkpoints" / "best.ckpt").read_bytes(), load(first / "distilled.safetensors")

    fit("--data.env_steps=12_800", "--ckpt_path=last")
    assert (second / "checkpoints" / "best.ckpt").read_bytes() == best
    assert torch.equal(load(second / "distilled.safetensors").observations, dataset.observations)
    assert env_steps(second / "checkpoints" / "last.ckpt") == 12_800


def test_best_checkpoint_is_looked_for_beside_the_one_that_is_loaded(here, monkeypatch):
    """Whatever the working directory, and also where the run was moved."""
    fit("--data.env_steps=6_400")
    (here / "elsewhere").mkdir()
    run = (here / "runs" / "CartPole-v1" / "version_0").rename(here / "moved")
    best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    make_unbeatable(last)
    monkeypatch.chdir(here / "elsewhere")
    fit("--data.env_steps=12_800", f"--ckpt_path={last}")
    goes_on = here / "elsewhere" / "runs" / "CartPole-v1" / "version_0" / "checkpoints"
    assert (goes_on / "best.ckpt").read_bytes() == best.read_bytes()


def test_runs_that_begin_at_once_have_a_folder_each(tmp_path):
    loggers = [RunFolder(tmp_path, name="CartPole-v1") for _ in range(3)]
    assert [Path(logger.log_dir).name for logger in loggers] == ["version_0", "version_1", "version_2"]
    assert loggers[0].version == 0, "and keep it"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "Ant-v5").touch()
    with pytest.raises(ConfigError, match=r"output folder '.*Ant-v5' is not writable: Not a directory"):
        RunFolder(tmp_path, name="Ant-v5").log_dir  # noqa: B018


def test_several_best_checkpoints_need_several_names():
    with pytest.raises(
        ConfigError, match=r"checkpoint\.save_top_k=3 with checkpoint\.filename='best': allowed are 0 and 1"
    ):
        RunCheckpoint(monitor="val/return", filename="best", save_top_k=3)
    RunCheckpoint(monitor="val/return", filename="{env_steps:.0f}", save_top_k=3)


def test_best_dataset_comes_along_into_another_working_directory(here, monkeypatch):
    before, after = ExportDataset(), ExportDataset()
    after.fits = True
    before.folder, before.best_return, after.folder = Path("first"), 3.0, here / "second"
    make_dataset().save(here / "first" / "distilled.safetensors")
    state = before.state_dict()
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    after.load_state_dict(state)
    assert after.best_return == 3.0
    assert (here / "second" / "distilled.safetensors").read_bytes() == (
        here / "first" / "distilled.safetensors"
    ).read_bytes()


def test_best_dataset_is_looked_for_beside_the_checkpoint(tmp_path, caplog):
    """The run's folder has been moved; where it was, there is another run now."""
    before, after = ExportDataset(), ExportDataset()
    after.fits = True
    before.folder, before.best_return, after.folder = tmp_path / "version_0", 3.0, tmp_path / "version_1"
    for folder, seed in (("version_0", 1), ("moved", 2)):
        make_dataset(metadata={"seed": seed}).save(tmp_path / folder / "distilled.safetensors")
    loading = SimpleNamespace(ckpt_path=tmp_path / "moved" / "checkpoints" / "last.ckpt")
    after.on_load_checkpoint(loading, None, {})
    after.load_state_dict(before.state_dict())
    assert load(tmp_path / "version_1" / "distilled.safetensors").metadata["seed"] == 2
    assert not caplog.records
    for folder in ("version_0", "moved"):
        (tmp_path / folder / "distilled.safetensors").unlink()
    lost = ExportDataset()
    lost.fits, lost.folder = True, tmp_path / "version_2"
    lost.on_load_checkpoint(loading, None, {})
    lost.load_state_dict(before.state_dict())
    assert lost.best_return is None
    assert "the best dataset so far is not in" in caplog.text


@pytest.mark.parametrize(("interrupted", "made_up_for"), [(2, [2, 4]), (4, [4])])
def test_a_validation_that_was_interrupted_is_made_up_for(here, monkeypatch, interrupted, made_up_for):
    validation, seen = MetaPPO.validation_step, []

    def breaks(self, *args):
        if self.iteration == interrupted:
            raise RuntimeError("interrupted")
        validation(self, *args)

    def noted(self, *args):
        seen.append(int(self.iteration))
        validation(self, *args)

    options = ["--data.env_steps=2560", "--trainer.val_check_interval=0.5"]
    monkeypatch.setattr(MetaPPO, "validation_step", breaks)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(*options)
    monkeypatch.setattr(MetaPPO, "validation_step", noted)
    fit(*options, "--ckpt_path=last")
    assert seen == made_up_for
    assert (here / "runs" / "CartPole-v1" / "version_1" / "checkpoints" / "best.ckpt").is_file()
    # What was validated when it stopped is not validated again.
    fit("--data.env_steps=3200", "--trainer.val_check_interval=0.4", "--ckpt_path=last")
    assert seen == made_up_for


def test_a_finished_run_that_is_typed_again_learns_no_further(here):
    """The last iteration was not validated, nor is it to be."""
    for more in ([], ["--ckpt_path=last"]):
        fit("--data.env_steps=1920", "--trainer.val_check_interval=0.7", *more)
    first, second = (here / "runs" / "CartPole-v1" / f"version_{index}" for index in range(2))
    assert logged_steps(first) == [640.0, 1280.0, 1920.0]
    assert not logged_steps(second)
    for name in ("best", "last"):
        ours, before = (run / "checkpoints" / f"{name}.ckpt" for run in (second, first))
        assert env_steps(ours) == env_steps(before)
    assert load(second / "distilled.safetensors").metadata["returns"]


def test_a_limit_of_time_is_of_each_start(here):
    limit = "--trainer.max_time=00:00:30:00"
    fit("--data.env_steps=1_280", limit)
    last = here / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 30 * 60.0
    torch.save(checkpoint, last)
    fit("--data.env_steps=2_560", limit, "--ckpt_path=last")
    assert logged_steps(here / "runs" / "CartPole-v1" / "version_1") == [1920.0, 2560.0]


def test_a_longer_run_has_the_schedule_of_its_length(here):
    """Of schedulers that compute a rate from the one before as well."""
    fit("--data.env_steps=1_280", "--model.scheduler=CosineAnnealingLR")
    fit("--data.env_steps=2_560", "--model.scheduler=CosineAnnealingLR", "--ckpt_path=last")
    fit("--data.env_steps=2_560", "--model.scheduler=CosineAnnealingLR")
    runs = here / "runs" / "CartPole-v1"
    rates = [logged(runs / f"version_{index}", "policy/optimizer_lr") for index in range(3)]
    assert rates[1] == pytest.approx(rates[2][2:])
    assert rates[2] == pytest.approx([rates[2][0] * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_a_file_takes_the_place_of_files_alone(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "folder" / "file")
    make_dataset().save(link)
    assert link.is_symlink()
    assert load(tmp_path / "folder" / "file").pairs == make_dataset().pairs
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe' is no file"):
        make_dataset().save(pipe)
    assert pipe.is_fifo()


def test_what_is_no_checkpoint_is_named(tmp_path):
    text, broken, objects = (tmp_path / name for name in ("mine.yaml", "broken.ckpt", "objects.ckpt"))
    text.write_text("model: {pairs: 3}")
    torch.save({"state_dict": {}}, broken)
    broken.write_bytes(broken.read_bytes()[:-50])
    torch.save({"path": Path("somewhere")}, objects)
    with pytest.raises(ConfigError, match=r"ckpt_path=.*: cannot be read \(Is a directory\)"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)
    for path, why in (
        (text, "no whole file of torch's"),
        (broken, "no whole file of torch's"),
        (objects, "Weights only"),
    ):
        with pytest.raises(
            ConfigError, match=rf"ckpt_path='.*{path.name}': not a checkpoint that can be read safely \({why}"
        ):
            AtomicCheckpointIO().load_checkpoint(path)
    for content in ([1], {"weight": torch.ones(2)}):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ConfigError, match=r"ckpt_path=.*other\.ckpt': a file of torch, but no checkpoint of a run"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "other.ckpt")


def test_the_last_checkpoint_is_listed_though_the_first_was_the_best(here, capsys):
    """That one is tested at the end, and was written when there was no last one."""
    fit(
        "--data.env_steps=6_400",
        "--trainer.val_check_interval=0.5",
        "--checkpoint.monitor=env_steps",
        "--checkpoint.mode=min",
    )
    (best,) = here.rglob("best.ckpt")
    assert env_steps(best) < env_steps(best.with_name("last.ckpt"))
    assert "last.ckpt" in capsys.readouterr().out


def test_a_figure_that_nobody_logs_is_named_and_the_run_goes_on_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        fit("--data.env_steps=1280", "--trainer.val_check_interval=0.5", "--checkpoint.monitor=my/retrun")
    assert ended.value.code == 2
    assert "monitor='my/retrun'" in capsys.readouterr().err.splitlines()[-1]
    fit("--data.env_steps=1280", "--trainer.val_check_interval=0.5", "--ckpt_path=last")
    after = load(tmp_path / "runs" / "CartPole-v1" / "version_1" / "last.safetensors")
    assert after.metadata["env_steps"] == 1280


def test_what_is_learned_after_the_last_validation_is_kept(here):
    """The end of a run that validates at 60 % of it, and a longer one from there."""
    fit("--data.env_steps=6_400", "--trainer.val_check_interval=0.6")
    run = here / "runs" / "CartPole-v1" / "version_0"
    assert env_steps(run / "checkpoints" / "last.ckpt") == 6_400
    end = load(run / "last.safetensors").metadata
    assert end["env_steps"] == 6_400
    assert not end["returns"], "those of the validation are of other pairs"
    assert load(run / "distilled.safetensors").metadata["env_steps"] == 3_840
    fit("--data.env_steps=7_680", "--ckpt_path=last")
    assert logged_steps(run.parent / "version_1") == [7_040, 7_680]


def test_without_checkpoints_the_best_dataset_is_not_replaced_by_the_end(here, monkeypatch):
    evaluate = MetaPPO.evaluate

    def worse_and_worse(self, *args, **kwargs):
        rows = evaluate(self, *args, **kwargs)
        for evaluation in rows.values():
            evaluation.returns.fill_(-float(self.iteration))
        return rows

    monkeypatch.setattr(MetaPPO, "evaluate", worse_and_worse)
    fit("--data.env_steps=6_400", "--trainer.enable_checkpointing=false")
    run = here / "runs" / "CartPole-v1" / "version_0"
    best, end = (load(run / f"{name}.safetensors").metadata for name in ("distilled", "last"))
    assert (best["env_steps"], end["env_steps"]) == (1_280, 6_400)
    assert end["returns"], "the test was of it"


def test_a_resumed_run_has_the_seed_of_its_checkpoint(here):
    fit("--data.env_steps=1_280", "--seed_everything=2")
    first, second = (here / "runs" / "CartPole-v1" / f"version_{index}" for index in (0, 1))
    fit("--data.env_steps=2_560", f"--ckpt_path={first / 'checkpoints' / 'last.ckpt'}")
    assert load(second / "distilled.safetensors").metadata["seed"] == 2
    assert torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["seed"] == 2


def test_a_run_does_not_go_on_in_another_variant_of_its_environment(here, capsys):
    fit("--data.env_steps=640")
    last = here / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit):
        fit("--data.env_steps=1_280", f"--ckpt_path={last}", "--data.env_kwargs={sutton_barto_reward: true}")
    assert "data.env_kwargs" in capsys.readouterr().err


def test_a_checkpoint_with_options_that_are_gone_is_named(here, capsys):
    fit("--data.env_steps=640")
    last = here / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["hyper_parameters"]["retired"] = 1
    torch.save(checkpoint, last)
    for command in ("fit", "test", "validate"):
        with pytest.raises(SystemExit):
            main([command, *FIT[1:], f"--ckpt_path={last}"])
        said = capsys.readouterr().err
        assert "MetaPPO does not take (retired): of an earlier version" in said
        assert "--model.start=FILE" in said


class StopAfter(L.Callback):
    def __init__(self, iterations):
        self.iterations = iterations

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.iteration == self.iterations:
            raise RuntimeError("stopped")


def six_iterations(folder, callbacks=(), ckpt_path=None, seed=1):
    L.seed_everything(seed, verbose=False)
    data = CollectorDataModule("CartPole-v1", env_steps=16 * 20 * 6, num_envs=16, rollout_length=20)
    module = MetaPPO(data.spec, pairs=3, learners=4, lifetime=4)  # longer than until the interruption
    checkpoint = RunCheckpoint(dirpath=folder, filename="last", enable_version_counter=False, save_on_exception=True)
    run = trainer(enable_checkpointing=True, callbacks=[checkpoint, *callbacks], plugins=[AtomicCheckpointIO()])
    check_family(module)  # as the command line does
    run.fit(module, data, ckpt_path=ckpt_path)
    return module, [optimizer.state_dict() for optimizer in run.optimizers], run.optimizers[0].param_groups


@pytest.mark.parametrize("seed", [0, 1])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, seed):
    """…that is, the uninterrupted run which restarts its environments at that point."""
    with pytest.raises(RuntimeError, match="stopped"):
        six_iterations(tmp_path, [StopAfter(3)], seed=seed)
    torch.manual_seed(1234)  # whatever state the new process is in
    resumed, *optimizers = six_iterations(tmp_path / "resumed", ckpt_path=tmp_path / "last.ckpt", seed=seed)

    endless = Rollouts.__iter__

    def restarting(self):
        before = endless(self)
        for _ in range(3):
            yield next(before)
        before.close()
        module = self.data.trainer.lightning_module
        module._running = module._returns_so_far = None  # no episode goes on
        yield from endless(self)

    without_restart, *_ = six_iterations(tmp_path / "whole", seed=seed)
    monkeypatch.setattr(Rollouts, "__iter__", restarting)
    uninterrupted, *expected = six_iterations(tmp_path / "restarting", seed=seed)
    assert resumed.iteration == uninterrupted.iteration == 6
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    torch.testing.assert_close(optimizers, expected, rtol=0, atol=0)
    assert not torch.equal(without_restart.synthetic_batch.targets, resumed.synthetic_batch.targets), "a restart shows"


def test_a_run_goes_on_with_other_environments_for_the_steps_that_are_left(here):
    """Its length is in environment steps, not in iterations, whose size may change with the number of processes, too."""
    fit("--data.env_steps=6_400")
    fit("--ckpt_path=last", "--data.env_steps=12_800", "--data.num_envs=64")
    runs = here / "runs" / "CartPole-v1"
    assert logged_steps(runs / "version_1") == [6_400 + 1_280 * i for i in (1, 2, 3, 4, 5)]


def test_an_environment_that_breaks_leaves_what_was_learned(here):
    with pytest.raises(RuntimeError, match="the simulator broke"):
        main(BREAKS)
    run = here / "runs" / "ProbeBreaks-v0" / "version_0"
    assert env_steps(run / "checkpoints" / "last.ckpt") == 4 * 160, "100 steps: four rollouts of 20 and a broken one"
    for name in ("last", "distilled"):
        assert load(run / f"{name}.safetensors").metadata["env_steps"] == 640


def test_a_lost_worker_ends_the_run(here, monkeypatch):
    workers = []
    fetch = Rollouts.__iter__

    def losing(self):
        for index, rollout in enumerate(fetch(self)):
            if index == 2:
                simulator = self.collector.env.simulator
                workers.extend(simulator.envs.processes)
                os.kill(workers[1].pid, signal.SIGKILL)
            yield rollout

    monkeypatch.setattr(Rollouts, "__iter__", losing)
    with pytest.raises(RuntimeError, match="a simulator's process was lost"):
        fit("--data.env_steps=10_000", "--data.backend=processes", "--data.num_envs=2", "--model.learners=2", OFTEN)
    assert len(workers) == 2
    assert env_steps(here / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt") == 3 * 40
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_full_disk_leaves_the_last_whole_ones(here, monkeypatch, capsys):
    synchronise, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            os.ftruncate(descriptor, 10)
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(descriptor)

    monkeypatch.setattr(lightning_distill.dataset.os, "fsync", full)
    with pytest.raises(SystemExit) as ended:
        fit("--data.env_steps=100_000", OFTEN)
    assert ended.value.code == 1
    assert "error: No space left on device" in capsys.readouterr().err
    run = here / "runs" / "CartPole-v1" / "version_0"
    assert len(calls) > 12
    assert env_steps(run / "checkpoints" / "last.ckpt") == 11 * 640, "one of the twelve was environment.json"
    assert not [path for path in run.rglob(".*")], "nothing half written is left"


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_nothing_in_a_checkpoint_is_executed(command, here, capsys):
    """The hyper-parameters, too, are read by Lightning before the run begins."""
    torch.save({"state_dict": {}, "hyper_parameters": Hostile()}, "hostile.ckpt")
    with pytest.raises(SystemExit):
        main([command, *FIT[1:], "--data.env_steps=640", "--ckpt_path=hostile.ckpt"])
    assert "hostile.ckpt" in capsys.readouterr().err
    assert not Path("executed").exists()
    torch.load("hostile.ckpt", weights_only=False)
    assert Path("executed").exists(), "the trap works"


def test_a_missing_checkpoint_is_named(here, capsys):
    with pytest.raises(SystemExit):
        fit("--ckpt_path=nowhere.ckpt")
    assert "ckpt_path='nowhere.ckpt': no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("env", "word"), [("NotANumber", "a reward"), ("NotAnObservation", "an observation")])
def test_numbers_that_are_none_end_the_run(env, word, here, capsys):
    with pytest.raises(SystemExit):
        fit(f"--data.env=Probe{env}-v0", "--data.env_steps=1000")
    assert f"returned {word} that is NaN" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_changes_nothing():
    """Nor does the momentum of the steps before."""
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.Adam(parameters, lr=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert clipped_step(optimizer, parameters, 0.5).isfinite()
    moved, moments = [parameter.clone() for parameter in parameters], copy.deepcopy(optimizer.state_dict())
    for bad in (float("nan"), float("inf")):
        parameters[0].grad, parameters[1].grad = torch.tensor([1.0, bad, 2.0]), torch.ones(2)
        assert not clipped_step(optimizer, parameters, 0.5).isfinite()
        assert all(torch.equal(*pair) for pair in zip(parameters, moved, strict=True))
    torch.testing.assert_close(optimizer.state_dict(), moments, rtol=0, atol=0)


class Poisoned(MetaPPO):
    """The policy loss of some updates is NaN."""

    poisoned: set[int] = set()
    updates = 0

    def _policy_loss(self, batch):
        loss, entropy, log_ratio = super()._policy_loss(batch)
        self.updates += 1
        return loss * (float("nan") if self.updates in self.poisoned else 1.0), entropy, log_ratio


class Metrics(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        self.last = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_broken_minibatch_is_skipped_and_counted():
    class Once(Poisoned):
        poisoned = {18}

    metrics = Metrics()
    module = small_run(model=Once, callbacks=[metrics], pairs=3, learners=4, epochs=4, target_kl=1e9)
    assert metrics.last["gradient/skipped"] == 1
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_an_iteration_without_any_gradient_ends_the_run():
    class Always(Poisoned):
        poisoned = set(range(17, 1000))

    with pytest.raises(ConfigError, match=r"no finite gradient of the actor in iteration 1 \(after 320 steps\)"):
        small_run(model=Always, iterations=4, pairs=3, learners=4, epochs=4, target_kl=1e9)


def test_a_dataset_of_broken_numbers_is_never_written(tmp_path):
    module, _ = prepared("discrete")
    with torch.no_grad():
        module.synthetic_batch.targets.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        module.distilled()


@pytest.mark.parametrize("tested", [True, False])
def test_a_run_without_validation_keeps_its_end(here, tested):
    """There is no best one to choose."""
    fit("--data.env_steps=1280", "--trainer.limit_val_batches=0", f"--trainer.limit_test_batches={float(tested)}")
    (run,) = (path.parent for path in here.rglob("metrics.csv"))
    assert env_steps(run / "checkpoints" / "last.ckpt") == env_steps(run / "checkpoints" / "best.ckpt") == 1280
    dataset = load(run / "distilled.safetensors")
    assert dataset.metadata["env_steps"] == 1280
    assert bool(dataset.metadata["returns"]) == tested
