"""What the documents show works: commands parse, Python blocks run, links lead somewhere."""

import re
import shlex
from pathlib import Path

import gymnasium
import nbformat
import pytest
import torch

from lightning_distill.cli import TRAINING, main
from lightning_distill.shell import COMMANDS, _parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMAND = re.compile(r"^ *(?:\w+=\S+ |srun )*lightning(?:-distill)? (?P<arguments>.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]+)?(?:#(?P<anchor>[^)]+))?\)")


def texts():
    """Name → text of every document, and of the prose of every notebook."""
    found = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
    for path in NOTEBOOKS:
        cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
        found[str(path.relative_to(ROOT))] = "\n\n".join(cells)
    return found


def commands():
    shown = [match["arguments"] for text in texts().values() for match in COMMAND.finditer(text)]
    return sorted({arguments.split(" #")[0].strip() for arguments in shown})


def blocks(text, language):
    return [match["text"] for match in BLOCK.finditer(text) if match["language"] == language]


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """Where a reader has typed off the configs (whose first line names the file) and modules that documents speak of."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    for text in texts().values():
        for block in (*blocks(text, "yaml"), *blocks(text, "python")):
            if named := re.match(r"# (\w+\.\w+)\n", block):
                (tmp_path / named[1]).write_text(block)
    for cell in (cell for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells):
        if cell.source.startswith("%%writefile "):
            first, _, content = cell.source.partition("\n")
            (tmp_path / first.split()[1]).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("command", commands())
def test_command_parses(command, readers_folder, capsys):
    name, *arguments = shlex.split(command)
    assert name in (*TRAINING, *COMMANDS)
    if name in COMMANDS:
        _parser(name).parse_args(arguments)
        return
    with pytest.raises(SystemExit) as ended:  # after help or config have been printed
        main([name, *arguments, *([] if "help" in command else ["--print_config"])])
    assert ended.value.code == 0, capsys.readouterr().err[-500:]


def run_python(name):
    """The names that a document's Python defines."""
    defined = {"__name__": "reader"}
    exec("\n".join(blocks(texts()[name], "python")), defined)
    return defined


@pytest.mark.parametrize("name", ["docs/file_format.md", "docs/your_own.md"])
def test_python_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(name)


def test_the_readme_teaches_a_network_that_plays():
    torch.manual_seed(0)
    policy = run_python("README.md")["policy"]
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(policy(observation))
        total, done = total + reward, terminated or truncated
    assert total == 500


def heading_anchors(path):
    """As GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", texts())
def test_links_lead_somewhere(name):
    for link in LINK.finditer(texts()[name]):
        target = (ROOT / name).parent / link["path"] if link["path"] else ROOT / name
        assert target.exists(), link[0]
        assert not link["anchor"] or link["anchor"] in heading_anchors(target), link[0]
