"""The project's configs, wherever a command is typed."""

from __future__ import annotations

from pathlib import Path

from .envs.spec import ConfigError

_HERE = Path(__file__).parent


def with_shipped_config(argument: str) -> str:
    """An argument that names a config of the project's ``conf/`` (``conf/ant.yaml``, ``--config=conf/ant.yaml``), which is not a file
    where the command is typed, as the file that came with the package; any other argument as it is."""
    option, equals, name = argument.rpartition("=")
    if not name.startswith("conf/") or Path(name).is_file():
        return argument
    # In an installed package conf/ is part of it; in a checkout it lies beside it.
    found = next((folder / name for folder in (_HERE, _HERE.parent) if (folder / name).is_file()), name)
    return f"{option}{equals}{found}"


def check_seed(seed: int | bool | None) -> None:
    """Raise ``ConfigError`` for a seed that numpy does not take. (True is any seed, None and False none.)"""
    if type(seed) is int and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything={seed}: allowed are integers from 0, below 2**32")
