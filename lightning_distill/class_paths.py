"""Class paths: what a config or a file calls a class or function, and what is behind such a name."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .learners import LearnerFamily


def described(family: LearnerFamily, known: type[LearnerFamily], arguments: dict[str, Any]) -> dict[str, Any]:
    """A family's entry in a file. A subclass is named by its own path, as it may draw others."""
    path = f"lightning_distill.{known.__name__}" if type(family) is known else class_path(type(family))
    return {"class_path": path, "init_args": arguments}


def imported(path: str) -> Any:
    """What a class path ``package.module.Name`` names; whatever its module raises is passed on."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def class_path(factory: Any) -> str:
    """Of a class or function; of a partial one the arguments too."""
    if isinstance(factory, partial):
        if (factory.func.__module__ or "").startswith("jsonargparse"):  # of a config's class_path and init_args
            factory = partial(factory.args[-1], **factory.keywords)
        arguments = [
            *map(_shown, factory.args),
            *(f"{name}={_shown(value)}" for name, value in factory.keywords.items()),
        ]
        return f"functools.partial({', '.join([class_path(factory.func), *arguments])})"
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', type(factory).__name__)}"


def _shown(value: Any) -> str:
    """As Python writes it; of what it knows by its address alone the type."""
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)
