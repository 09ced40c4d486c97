"""Pipelines: runs one after another, each of which may begin with what an earlier one wrote."""

from __future__ import annotations

import io
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from string import Template
from typing import Any

import yaml

from .dataset import write_atomically
from .envs import ConfigError


def run_pipeline(path: str, folder: Path, options: Sequence[str] = (), output: Any = None) -> dict[str, Path]:
    """Carry out a pipeline, and go on with it where it stopped.

    Args:
        path: a YAML file of stages in their order, name → what ``lightning fit`` is given. In it ``${NAME}`` is the folder of an earlier
            stage's run, with ``distilled.safetensors`` or, of direct RL, ``checkpoints/last.ckpt``.
        folder: where runs go, those of a stage below ``folder / name``. A stage that finished with the same config is not run again;
            one that was stopped goes on from its last checkpoint.
        options: more options of ``lightning fit``, for every stage, such as ``--seed_everything=2``.
        output: file for what the runs print; default: standard output.

    Returns:
        The folder of each stage's run.

    Raises:
        ConfigError: the file is no pipeline, a stage's arguments are not understood (all are tried before the first run), or a run
            failed.
    """
    stages = _read(path)
    places = {name: f"{folder / name}/VERSION" for name in stages}
    for name, command in stages.items():
        try:
            _config([*_arguments(command, places), *options])
        except ConfigError as error:
            raise ConfigError(f"{path}: stage {name!r}: {error}") from None
    finished: dict[str, Path] = {}
    for name, command in stages.items():
        arguments = [*_arguments(command, finished), *options]
        finished[name] = _run(name, arguments, folder / name, output)
    return finished


def _read(path: str) -> dict[str, str]:
    try:
        stages = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"pipeline={path!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"pipeline={path!r}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(stages, dict) or not all(isinstance(command, str) for command in stages.values()):
        raise ConfigError(f"pipeline={path!r}: allowed are lines NAME: OPTIONS of lightning fit")
    known: list[str] = []
    for name, command in stages.items():
        try:
            _arguments(command, dict.fromkeys(known, ""))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"pipeline={path!r}: stage {name!r} speaks of {error}; allowed are earlier stages: {', '.join(known) or 'none'}"
            ) from None
        known.append(name)
    return stages


def _arguments(command: str, folders: dict[str, Any]) -> list[str]:
    return [Template(word).substitute(folders) for word in shlex.split(command)]


def _config(arguments: Sequence[str]) -> str:
    """The whole config of ``lightning fit`` with these arguments; what it says of them, if it does not understand, is the error."""
    from .lightning_cli import run

    config, said = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(config), redirect_stderr(said):
            run(["fit", *arguments, "--print_config"])
    except SystemExit as ended:
        if ended.code:
            raise ConfigError(said.getvalue().strip().rpartition("error: ")[2]) from None
    return config.getvalue()


def _run(name: str, arguments: list[str], root: Path, output: Any) -> Path:
    """The folder of a stage's finished run."""
    record, begun, config = root / "finished.json", root / "begun.yaml", _config(arguments)
    if record.is_file():
        last = json.loads(record.read_text())
        if last.get("config") == config and Path(last["folder"]).is_dir():
            return Path(last["folder"])
    print(f"{name}: lightning fit {shlex.join(arguments)}", file=output, flush=True)
    command = [sys.executable, "-m", "lightning_distill.cli", "fit", *arguments]
    command += [f"--trainer.default_root_dir={root}"]
    if not (begun.is_file() and begun.read_text() == config):
        write_atomically(begun, config.encode())
    # What another config has learned is no beginning of this one.
    since = begun.stat().st_mtime
    if any(path.stat().st_mtime > since for path in root.rglob("last.ckpt")):
        command += ["--ckpt_path=last"]
    process = subprocess.Popen(command, stdout=output)
    # A run that is told to end saves first: to be waited for. Ctrl-C reaches it by itself.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        failed = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise ConfigError(f"stage {name!r} ended with exit code {failed}; the same command goes on where it stopped")
    checkpoints = sorted(root.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise ConfigError(f"stage {name!r} wrote no checkpoint, with which others could go on")
    run = checkpoints[-1].parents[1]
    write_atomically(record, json.dumps({"config": config, "folder": str(run)}).encode())
    return run
