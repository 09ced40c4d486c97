"""The notebooks run from end to end, and are shipped with what they showed."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """Kinds of what a cell shows; warnings come and go."""
    return {
        output.name if output.output_type == "stream" else output.output_type
        for output in cell.outputs
        if output.get("name") != "stderr"
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_keeps_its_outputs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # envpool, once imported, leaves one that shows nothing
    kept = nbformat.read(path, 4)
    assert [cell.execution_count for cell in code(kept)] == list(range(1, len(code(kept)) + 1)), "executed in order"
    executed = nbformat.read(path, 4)
    for cell in code(executed):
        cell.outputs = []
    NotebookClient(executed, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert [shown(cell) for cell in code(kept)] == [shown(cell) for cell in code(executed)]
    assert any("image/png" in output.get("data", {}) for cell in code(kept) for output in cell.outputs)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4
