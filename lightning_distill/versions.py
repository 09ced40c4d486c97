"""Which versions of what a result came from."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "lightning-distill",
    "torch",
    "lightning",
    "torchrl",
    "tensordict",
    "numpy",
    "gymnasium",
    "mujoco",
    "ale-py",
    "envpool",
    "wandb",
)


def versions() -> dict[str, str]:
    """Name → version of Python and of every installed package that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
