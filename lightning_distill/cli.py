"""The commands ``lightning`` and ``lightning-distill``: one program.

``fit``, ``validate`` and ``test`` are LightningCLI's; the others are in ``shell``. What a command needs is imported when
that command is called, so that help and the light commands are there at once.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch

from .dataset import DatasetError
from .envs import ConfigError
from .shell import COMMANDS, run, summary
from .versions import versions

TRAINING = {
    "fit": "Distil an environment into a dataset (or train by PPO), then test the result.",
    "validate": "Validate a checkpoint: fresh learners, sampled actions.",
    "test": "Test a checkpoint: fresh learners, sampled and greedy actions.",
}


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning`` and ``lightning-distill``."""
    try:
        _main(args)
    except KeyboardInterrupt:  # before there was anything to save; a training saves, and says so itself
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _main(args: list[str] | None) -> None:
    given = sys.argv[1:] if args is None else args
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if given else 2)
    if given[0] == "--version":
        print("\n".join(f"{name} {number}" for name, number in versions().items()))
        return
    if importlib.util.find_spec("jsonargparse") is None:
        print(
            "error: installed without its dependencies, which all commands need; load and teach do not", file=sys.stderr
        )
        sys.exit(2)
    if "OMP_NUM_THREADS" not in os.environ:
        # Learners are small: on CPUs a second thread gains 1.3× at best, and loses 10× where it shares its core.
        torch.set_num_threads(1)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own environments, families and models lie where the command is typed
    if given[0] in COMMANDS:
        run(given[0], given[1:])
        return
    if given[0] not in TRAINING and not given[0].startswith("-"):
        print(f"error: command={given[0]!r}: allowed are {', '.join([*TRAINING, *COMMANDS])}", file=sys.stderr)
        sys.exit(2)
    from omegaconf.errors import OmegaConfBaseException

    from . import lightning_cli

    try:
        lightning_cli.run(args)
    except (ConfigError, DatasetError, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = "checkpoints and datasets that were written are whole: make room and go on with --ckpt_path=last"
        print(f"error: {error.strerror}; {kept}", file=sys.stderr)
        sys.exit(1)


def usage() -> str:
    """All commands with a line on each."""
    name = Path(sys.argv[0]).name
    lines = [f"usage: {name} COMMAND [OPTIONS]", ""]
    lines += [f"  {command:10}{text}" for command, text in TRAINING.items()]
    lines += [f"  {command:10}{summary(command)}" for command in COMMANDS]
    return "\n".join([*lines, "", f"`{name} COMMAND --help` says what a command takes; --version prints versions."])


if __name__ == "__main__":
    main()
