"""Pipelines: runs one after another, each of which may begin with what an earlier one wrote."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from .checkpoints import AtomicCheckpointIO
from .class_paths import class_path, imported
from .dataset import write_atomically
from .distillation import Distillation
from .envs import ConfigError, EnvSpec, env_spec
from .experts import Expert
from .lightning_cli import CheckingCLI
from .lightning_cli import run as run_lightning
from .loggers import gives_folders, runs_folder

#: What a run that distils writes for others to begin with or to imitate, and what one of direct RL does.
DATASETS = ("distilled.safetensors", "last.safetensors")
CHECKPOINTS = ("checkpoints/best.ckpt", "checkpoints/last.ckpt")


def run_pipeline(path: str, folder: Path, options: Sequence[str] = (), output: Any = None) -> dict[str, Path]:
    """Carry out a pipeline, and go on with it where it stopped.

    Args:
        path: a YAML file of stages in their order, name → what ``lightning fit`` is given. In it ``${NAME}`` is the folder of an earlier
            stage's run, with ``distilled.safetensors`` or, of direct RL, ``checkpoints/last.ckpt``. A stage may be a list of such lines:
            each is a run, from a seed of its own (seed, seed + 1000, …), and the one with the highest return in validation is the stage's.
        folder: where runs go, those of a stage below ``folder / name``. A run that finished with the same config is not run again;
            one that was stopped goes on from its last checkpoint.
        options: more options of ``lightning fit``, for every run, such as ``--seed_everything=2``.
        output: file for what the runs print; default: standard output.

    Returns:
        The folder of each stage's run.

    Raises:
        ConfigError: the file is no pipeline, a run's arguments are not understood or speak of what is not there (all are tried before
            the first run), or a run failed.
    """
    stages = _read(path)
    places = {name: f"{folder / name}/VERSION" for name in stages}
    earlier: dict[str, list[dict[str, Any]]] = {}
    for name, commands in stages.items():
        configs = []
        for number, command in enumerate(commands):
            try:
                arguments = _seeded([*_arguments(command, places), *options], number)
                configs.append(yaml.safe_load(config_of(arguments)))
                _check(arguments, configs[-1], earlier, several=len(commands) > 1)
            except ValueError as error:
                raise ConfigError(f"{path}: stage {name!r}: {error}") from None
        earlier[places[name]] = configs
    chosen: dict[str, Path] = {}
    for name, commands in stages.items():
        runs = []
        for number, command in enumerate(commands):
            label = name if len(commands) == 1 else f"{name}/{number + 1}"
            arguments = _seeded([*_arguments(command, chosen), *options], number)
            runs.append(finished_run(label, arguments, folder / label, output))
        chosen[name] = runs[0] if len(runs) == 1 else _best(name, runs, output)
    return chosen


def _seeded(arguments: list[str], number: int) -> list[str]:
    """The arguments of one of a stage's runs, with a seed of its own: from the same one runs often end alike."""
    if number == 0:
        return arguments
    seed = yaml.safe_load(config_of(arguments))["seed_everything"]
    return [*arguments, f"--seed_everything={int(seed or 0) + 1000 * number}"]


def _read(path: str) -> dict[str, list[str]]:
    try:
        stages = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"pipeline={path!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"pipeline={path!r}: not YAML ({' '.join(str(error).split())})") from None
    if isinstance(stages, dict):
        stages = {name: [lines] if isinstance(lines, str) else lines for name, lines in stages.items()}
    named = isinstance(stages, dict) and all(isinstance(name, str) and name.isidentifier() for name in stages)
    if not named or not all(map(_are_lines, stages.values())):
        raise ConfigError(
            f"pipeline={path!r}: allowed are lines NAME: OPTIONS of lightning fit, or NAME: [OPTIONS, OPTIONS, ...], names of letters, "
            "digits and _"
        )
    known: list[str] = []
    for name, commands in stages.items():
        try:
            for command in commands:
                _arguments(command, dict.fromkeys(known, ""))
        except KeyError as error:
            raise ConfigError(
                f"pipeline={path!r}: stage {name!r} speaks of {error}; allowed are earlier stages: {', '.join(known) or 'none'}"
            ) from None
        except ValueError as error:  # of quotes that do not close, or a $ that is of no name
            raise ConfigError(f"pipeline={path!r}: stage {name!r}: {error}") from None
        known.append(name)
    return stages


def _are_lines(lines: Any) -> bool:
    return isinstance(lines, list) and bool(lines) and all(isinstance(line, str) for line in lines)


def _check(
    arguments: list[str], config: dict[str, Any], earlier: dict[str, list[dict[str, Any]]], several: bool
) -> None:
    """Raise unless a run can begin: all of it is made, with a stand-in for what an earlier stage will have written.

    Where something else than ``ckpt_path``, ``model.start`` and ``model.expert`` is of an earlier stage it cannot be made yet.

    Args:
        arguments: of ``lightning fit``.
        config: what they mean.
        earlier: configs of earlier stages' runs by the folder of the one that goes on, to be.
        several: whether it is one of several of its stage.
    """
    for name, value in (("data.env", config["data"]["env"]), ("model", config["model"])):
        if value is None:
            raise ConfigError(f"{name}: not given")
    _check_checkpoints(config["trainer"])
    if several and (config["checkpoint"]["monitor"] != "val/return" or config["trainer"].get("limit_val_batches") == 0):
        raise ConfigError(
            "checkpoint.monitor, trainer.limit_val_batches: the best of several runs is told by val/return of validations"
        )
    stand_ins, model = [], config["model"]["init_args"]
    for option, section, stand_in in (
        ("ckpt_path", config, "null"),
        ("model.start", model, "null"),
        ("model.expert", model, class_path(Unwritten)),
    ):
        key = option.removeprefix("model.")
        given = section.get(key)
        place = next((place for place in earlier if isinstance(given, str) and given.startswith(f"{place}/")), None)
        if place is not None:
            for each in earlier[place]:
                _check_written(option, given.removeprefix(f"{place}/"), config, each)
            stand_ins.append(f"--{option}={stand_in}")
            section[key] = None
    rest = yaml.safe_dump(config, width=math.inf)
    if any(f"{place}/" in rest for place in earlier):
        return
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as root, _as_it_was(), redirect_stdout(said), redirect_stderr(said):
            run_lightning(["fit", *arguments, *stand_ins, f"--trainer.default_root_dir={root}"], CheckingCLI)
    except SystemExit as ended:
        reason = said.getvalue().strip().rpartition("error: ")[2] if ended.code else "allowed are options of a run"
        raise ConfigError(reason) from None


@contextmanager
def _as_it_was() -> Iterator[None]:
    """What making a run changes for the whole process is put back: environment variables, random state, messages, determinism."""
    environment, level = dict(os.environ), logging.root.manager.disable
    deterministic = torch.are_deterministic_algorithms_enabled()
    logging.disable(logging.INFO)
    try:
        # GPUs' random states are of no use here, and asking for them would keep memory on each for as long as the pipeline runs.
        with isolate_rng(include_cuda=False), warnings.catch_warnings():
            yield
    finally:
        logging.disable(level)
        torch.use_deterministic_algorithms(deterministic)
        os.environ.clear()
        os.environ.update(environment)


def _check_written(option: str, file: str, config: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raise unless an earlier stage writes this file, and it is what an option takes, of the same shapes."""
    distils = issubclass(imported(earlier["model"]["class_path"]), Distillation)
    policies = DATASETS if distils else CHECKPOINTS
    written = {"ckpt_path": CHECKPOINTS, "model.start": DATASETS if distils else (), "model.expert": policies}[option]
    if file not in written:
        raise ConfigError(
            f"{option}={file!r} of an earlier stage, by {earlier['model']['class_path']}: allowed of it are {', '.join(written) or 'none'}"
        )
    mine, its = (env_spec(each["data"]["env"], each["data"]["env_kwargs"]) for each in (config, earlier))
    if mine.interface != its.interface:
        raise ConfigError(
            f"{option}={file!r} of an earlier stage in {its.id}, with observations, actions, outputs {its.interface}; "
            f"data.env={mine.id!r} has {mine.interface}"
        )


class Unwritten(Expert):
    """Stands for an expert that an earlier stage will have written."""

    def __init__(self, spec: EnvSpec) -> None:
        self.outputs = spec.actions
        self.log_std = torch.zeros(spec.actions) if spec.action_type == "continuous" else None

    def output(self, observations: Tensor) -> Tensor:
        return observations.new_zeros(len(observations), self.outputs)


def _check_checkpoints(trainer: dict[str, Any]) -> None:
    if trainer.get("enable_checkpointing") is False:
        raise ConfigError("trainer.enable_checkpointing=False: allowed is true, as runs go on from checkpoints")
    option, folder = runs_folder(trainer)
    if option != "trainer.default_root_dir" and not folder.startswith("${"):
        raise ConfigError(
            f"{option}={folder!r}: allowed is ${{trainer.default_root_dir}}, which each run is given as a folder of its own"
        )


def _best(name: str, runs: list[Path], output: Any) -> Path:
    """The run with the highest return in validation."""
    returns = {}
    for run in runs:
        callbacks = AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"]
        scores = [state["best_model_score"] for state in callbacks.values() if state.get("monitor") == "val/return"]
        if not scores or scores[0] is None:
            raise ConfigError(f"stage {name!r}: {run} was not validated, so that none of its runs is the best")
        returns[run] = float(scores[0])
    best = max(returns, key=returns.__getitem__)
    said = ", ".join(f"{value:.1f}" for value in returns.values())
    print(f"{name}: returns in validation {said}; going on with {best}", file=output, flush=True)
    return best


def _arguments(command: str, folders: dict[str, Any]) -> list[str]:
    return [Template(word).substitute(folders) for word in shlex.split(command)]


def config_of(arguments: Sequence[str]) -> str:
    """The whole config of ``lightning fit`` with these arguments; what it says of them, if it does not understand, is the error."""
    config, said = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(config), redirect_stderr(said):
            run_lightning(["fit", *arguments, "--print_config"])
    except SystemExit as ended:
        if ended.code:
            raise ConfigError(said.getvalue().strip().rpartition("error: ")[2]) from None
    return config.getvalue()


def finished_run(name: str, arguments: list[str], root: Path, output: Any = None, errors: Any = None) -> Path:
    """The folder of a finished run below ``root``: of one that finished with the same config, or is run now.

    Args:
        name: what messages call it.
        arguments: of ``lightning fit``.
        root: where it goes.
        output, errors: files for what it prints; default: standard output and error.

    Raises:
        ConfigError: the arguments are not understood, or the run failed.
    """
    record, begun, config = root / "finished.json", root / "begun.yaml", config_of(arguments)
    trainer = yaml.safe_load(config)["trainer"]
    _check_checkpoints(trainer)
    if record.is_file():
        try:
            last = json.loads(record.read_text())
            if last["config"] == config and Path(last["folder"]).is_dir():
                return Path(last["folder"])
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{str(record)!r}: damaged; without it the run goes on from its last checkpoint"
            ) from None
    print(f"{name}: lightning fit {shlex.join(arguments)}", file=output, flush=True)
    with _alone(root) as lock:
        # Without a logger that numbers runs each start has a folder of its own.
        starts = len(list(root.glob("start_*")))
        place = root / f"start_{starts}" if not gives_folders(trainer.get("logger")) else root
        fit = [sys.executable, "-m", "lightning_distill.cli", "fit"]
        command = [*fit, *arguments, f"--trainer.default_root_dir={place}"]
        if not (begun.is_file() and begun.read_text() == config):
            write_atomically(begun, config.encode())
        # What another config has learned is no beginning of this one.
        since = begun.stat().st_mtime
        if (last_checkpoint := _newest_checkpoint(root)) and last_checkpoint.stat().st_mtime > since:
            command += [f"--ckpt_path={last_checkpoint}"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, pass_fds=lock)
        failed, told = _waited_for(process)
    if failed:
        raise ConfigError(f"stage {name!r} ended with exit code {failed}; the same command goes on where it stopped")
    if (last_checkpoint := _newest_checkpoint(root)) is None:
        raise ConfigError(f"stage {name!r} wrote no checkpoint, with which others could go on")
    run = last_checkpoint.parents[1]
    write_atomically(record, json.dumps({"config": config, "folder": str(run)}).encode())
    if told:  # but the run had finished: it is recorded, and no other begins
        sys.exit(128 + told[0])
    return run


@contextmanager
def _alone(root: Path) -> Iterator[tuple[int, ...]]:
    """Nobody else runs anything below ``root`` in the meantime. Given to a run, the file descriptors hold the place for as long as that
    lives, which may be longer than its parent.

    Raises:
        ConfigError: somebody does.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{str(root)!r}: a run of this place is still going on, if its parent is gone as well; wait for it or end it, or give another "
                "folder (--output)"
            ) from None
        except (ImportError, OSError):  # a system, or a file system, without such locks
            yield ()
        else:
            yield (file.fileno(),)


def _waited_for(process: subprocess.Popen) -> tuple[int, list[int]]:
    """The exit code of a run, and the signals that came in the meantime.

    A run that is told to end saves first: to be waited for. Ctrl-C reaches it by itself. (Threads are told nothing.)
    """
    told: list[int] = []

    def tell(number: int, *_: Any) -> None:
        told.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _newest_checkpoint(root: Path) -> Path | None:
    return max(root.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
