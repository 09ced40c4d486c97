"""What a run was made with: versions, revisions, machine, command. Written beside its config as ``environment.json``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .versions import versions


def describe_run() -> dict[str, Any]:
    """Versions of everything that computes, git revisions of this project and of the working directory, the command."""
    import torch

    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": {
            "lightning-distill": git_revision(Path(__file__).parent, Path(__file__).name),
            "working directory": git_revision(Path.cwd()),
        },
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
    }


def git_revision(folder: Path, tracked: str = ".") -> str | None:
    """Commit of the repository that ``tracked`` in ``folder`` belongs to, with ``+changes`` if it is not all committed.

    None where there is no git or no repository; a package installed inside somebody's repository is not part of it.
    """

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(folder), *arguments]
        return subprocess.run(call, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", tracked)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
