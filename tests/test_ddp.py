import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_script.py")
    done = subprocess.run([sys.executable, str(script), str(folder), "20"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_processes_agree_bit_for_bit_after_twenty_iterations(ranks):
    first, second = ranks
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_gradients_are_averaged_over_processes(ranks):
    first, second = ranks
    assert len(first["gradients"]) >= 20
    assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True))


def test_each_process_draws_learners_of_its_own(ranks):
    drawn = torch.cat([*ranks[0]["fresh"], *ranks[1]["fresh"]]).flatten(1)
    assert len(drawn.unique(dim=0)) == len(drawn) == 2 * 20 * 4


def test_steps_and_statistics_are_of_all_processes(ranks):
    assert ranks[0]["state"]["env_steps"] == 2 * 16 * 20 * 20
    assert ranks[0]["state"]["observation_moments.count"] == 2 * 16 * 20 * 20
