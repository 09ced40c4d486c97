"""What benchmarks write: tables that agree with the files they are made from, and files that name nobody's folders."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS.parent / "RESULTS.md"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_tables_are_what_the_files_say(script):
    document = RESULTS.read_text()
    for name, made in script("results").tables().items():
        written = document.partition(f"<!-- {name}: begin -->\n")[2].partition(f"\n<!-- {name}: end -->")[0]
        assert written.splitlines() == made.splitlines(), f"{name}: python benchmarks/results.py writes it"


def test_records_are_named_after_their_runs():
    paths = list((BENCHMARKS / "records").glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert path.stem.startswith(f"{record['method']}-"), path
        assert path.stem.endswith(f"-{record['env'].replace('/', '_')}-seed{record['seed']}"), path


def test_a_published_config_names_no_folders(script):
    without_folders = script("publish").without_folders
    config = "expert: /home/somebody/runs/Ant-v5/distilled.safetensors\nenv: ALE/Pong-v5\nstart: '/a/b.safetensors'\nname: x/y"
    expected = "expert: distilled.safetensors\nenv: ALE/Pong-v5\nstart: 'b.safetensors'\nname: x/y"
    assert without_folders(config) == expected


def test_a_table_is_written_between_its_marks_and_nowhere_else(script, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\n<!-- b: begin -->\nb\n<!-- b: end -->\n")
    script("marked").write("a", "| new \\1 |", document)
    assert document.read_text() == (
        "before\n<!-- a: begin -->\n| new \\1 |\n<!-- a: end -->\n<!-- b: begin -->\nb\n<!-- b: end -->\n"
    )


def test_speed_is_measured_of_simulator_collection_and_training(script, monkeypatch, capsys):
    sizes = "--num_envs 8 --rollout_length 16 --iterations 4 --pairs 3 --learners 2 --epochs 1"
    monkeypatch.setattr(sys, "argv", ["throughput.py", "CartPole-v1", *sizes.split()])
    script("throughput").main()
    printed = capsys.readouterr().out
    assert "8 environments × 16 steps, 1 epochs" in printed
    bare, collection, training = (
        int(re.search(rf"{name}.* ([\d,]+) steps/s", printed)[1].replace(",", ""))
        for name in ("bare simulator", "collection", "training")
    )
    assert bare > training > 0
    assert collection > training
