"""Configs, wherever a command is typed, and what is allowed in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

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


def option_name(argument: str) -> str:
    """Which option an argument of the command line gives, in its short form: ``model.family.width``."""
    return argument.removeprefix("--").partition("=")[0].replace("init_args.", "")


def check_seed(seed: int | bool | None) -> None:
    """Raise ``ConfigError`` for a seed that numpy does not take, and for True, which Lightning takes for 0."""
    if seed is True or (type(seed) is int and not 0 <= seed < 2**32):
        raise ConfigError(f"seed_everything={seed}: allowed are integers from 0, below 2**32, and false for none")


def check_numbers(section: str, init: Callable[..., None], values: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for numbers that the types of a constructor's arguments (``PositiveInt`` …) do not allow.

    The command line looks at them itself; this is for those who call the constructor.

    Args:
        section: of the config that the constructor's arguments are.
        init: the constructor.
        values: its arguments by name; others are left alone.
    """
    for name, hint in get_type_hints(init).items():
        hints = hint, *get_args(hint)
        restricted = [each for each in hints if getattr(each, "__module__", None) == "jsonargparse.typing"]
        if not restricted or name not in values or ((value := values[name]) is None and type(None) in hints):
            continue
        try:
            if isinstance(value, str):  # which the type would read, as it does on the command line
                raise ValueError(f"{value!r} is a text")
            restricted[0](value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{section}.{name}={value!r}: {error}; allowed is {restricted[0].__name__}") from None
