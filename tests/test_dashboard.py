"""What a run shows of itself: W&B dashboard, sweep configs, the page for everybody else, and what it was made with."""

import base64
import dataclasses
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from lightning_distill import ConfigError, MetaPPO, load
from lightning_distill.callbacks import Dashboard
from lightning_distill.cli import main
from lightning_distill.envs import env_spec
from lightning_distill.families import family_named
from lightning_distill.html_report import write_report
from lightning_distill.provenance import git_revision
from lightning_distill.returns import Evaluation

CONF = Path(__file__).parents[1] / "conf"
SWEEPS = sorted((CONF / "sweeps").glob("*.yaml"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def spied(method, calls):
    def spy(self, *args, **kwargs):
        calls.append((args, kwargs))
        return method(self, *args, **kwargs)

    return spy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run with W&B offline, and all that was sent to it."""
    import wandb

    folder = tmp_path_factory.mktemp("dashboard")
    sent = {"log": [], "define_metric": [], "log_artifact": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        wandb.teardown()  # it would remember the mode of runs before,
        patch.setattr(wandb, "run", None)  # and the last of them
        for name in sent:
            patch.setattr(wandb.Run, name, spied(getattr(wandb.Run, name), sent[name]))
        main(
            [
                "fit",
                f"--config={CONF / 'cartpole_1d.yaml'}",
                "--data.num_envs=32",
                "--data.rollout_length=20",
                "--data.env_steps=6_400",
                "--data.val_learners=3",
                "--data.test_learners=3",
                "--held_out.families=[width_32]",
                "--dashboard.video=true",
                "--trainer.accelerator=cpu",
                "--trainer.enable_progress_bar=false",
            ]
        )
        wandb.teardown()
    return folder / "runs", sent


def test_dashboard_has_grouped_curves_over_environment_steps(finished):
    _, sent = finished
    metrics = {name for (values, *_), _ in sent["log"] for name in values}
    assert {
        "return",
        "val/return",
        "val/return_ci95",
        "held_out/width_32/return",
        "held_out/width_32/return_ci95",
        "policy/learning_rate",
        "policy/kl",
        "policy/clip_fraction",
        "policy/entropy",
        "loss/explained_variance",
        "gradient/actor",
        "gradient/critic",
        "steps/s",
        "time/simulation",
        "time/inference",
        "time/update",
        "env_steps",
    } <= metrics
    assert sent["define_metric"][-2] == (("*",), {"step_metric": "env_steps", "step_sync": True})
    shares = [
        [v[f"time/{part}"] for part in ("simulation", "inference", "update")]
        for (v,), _ in sent["log"]
        if "time/update" in v
    ]
    assert all(0 <= share <= 1 for row in shares for share in row)
    assert all(sum(row) == pytest.approx(1) for row in shares)


def test_dashboard_has_pictures_table_video_and_versions_of_the_dataset(finished):
    runs, sent = finished
    media = next((runs / "wandb").glob("offline-run-*")) / "files" / "media"
    assert len(list((media / "images").glob("pairs*.png"))) == 5, "one for each validation"
    assert next((media / "videos").rglob("*.gif")).stat().st_size > 0
    table = json.loads(next((media / "table").rglob("*.json")).read_text())
    returns = load(runs / "CartPole-v1/version_0/distilled.safetensors").metadata["returns"]
    assert set(returns) == {"in-distribution", "width_32"}
    assert [row[:2] for row in table["data"]] == [[family, kind] for family, kinds in returns.items() for kind in kinds]
    # W&B makes artifacts of tables, too.
    artifacts = [(a, kwargs["aliases"]) for (a, *_), kwargs in sent["log_artifact"] if a.type == "distilled-dataset"]
    assert len({artifact.name.split(":")[0] for artifact, _ in artifacts}) == 1, "versions of one dataset"
    final, aliases = artifacts[-1]
    assert "tested" in aliases
    assert (
        final.metadata["env_steps"] == load(runs / "CartPole-v1/version_0/distilled.safetensors").metadata["env_steps"]
    )
    assert final.metadata["returns"]["in-distribution"]["greedy"]["learners"] == 3


def test_run_folder_says_what_it_was_made_with(finished):
    run = finished[0] / "CartPole-v1" / "version_0"
    made = json.loads((run / "environment.json").read_text())
    assert made["seed"] == 1
    assert made["versions"]["torch"] == torch.__version__
    assert set(made["git"]) == {"lightning-distill", "working directory"}
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 1


def test_git_revision_tells_commits_and_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    (tmp_path / "installed").write_text("1")
    git("add", "file")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD")
    assert git_revision(tmp_path) == git_revision(tmp_path, "file") == head
    assert git_revision(tmp_path, "installed") is None, "in the folder, but not of the repository"
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == head + "+changes"


class Page(HTMLParser):
    """Collects pictures and text, and refuses whatever a browser would fetch or execute."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path):
        super().__init__()
        self.open, self.pictures, self.text, self.cells = [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes:
            assert not name.startswith("on")
            assert name not in ("src", "href", "srcset", "data") or value.startswith("data:image/"), value
            if name == "src":
                self.pictures.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data

    def images(self):
        for picture in self.pictures:
            kind, _, content = picture.removeprefix("data:image/").partition(";base64,")
            yield kind, base64.b64decode(content, validate=True)


def test_page_is_whole_and_self_contained(finished):
    run = finished[0] / "CartPole-v1" / "version_0"
    page = Page(run / "report.html")
    text = "".join(page.text)
    about = load(run / "distilled.safetensors").metadata
    returns, steps = about["returns"], f"{about['env_steps']:,} environment steps"
    assert set(returns) == {"in-distribution", "width_32"}
    for family, kinds in returns.items():
        for kind, entry in kinds.items():
            assert [family, kind, f"{entry['mean']:,.1f}"] in [page.cells[i : i + 3] for i in range(len(page.cells))]
    for words in ("CartPole-v1: 2 pairs", steps, torch.__version__, "val_learners: 3", "config.yaml"):
        assert words in text
    kinds = []
    for kind, content in page.images():
        kinds.append(kind)
        if kind == "png":
            assert content.startswith(b"\x89PNG")
        else:
            for element in ET.fromstring(content).iter():
                for name, value in element.attrib.items():
                    assert not name.endswith("href") or value.startswith(("#", "data:image/"))
    assert kinds == ["svg+xml", "png", "svg+xml"], "curves, pairs, pairs over time"


def test_what_cannot_be_drawn_is_said_before_the_run():
    spec = dataclasses.replace(env_spec("Pendulum-v1"), id="torchrl.envs.PendulumEnv")
    with pytest.raises(ConfigError, match="PendulumEnv' is a TorchRL environment, which cannot be drawn"):
        Dashboard(video=True).on_fit_start(None, MetaPPO(spec))


def test_a_video_that_fails_does_not_end_the_run(monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no display")

    monkeypatch.setattr("lightning_distill.watching.record", fails)
    Dashboard(video=True)._log_video(None, load("cartpole_1d_plain"), family_named("paper"))
    assert "no video: no display" in caplog.text


def test_page_shows_markup_as_text(tmp_path):
    attack = "<script>alert(1)</script>"
    evaluations = {attack: {"sampled": Evaluation(torch.ones(2, 1), False)}}
    path = write_report(
        tmp_path / "report.html",
        attack,
        attack,
        evaluations,
        players=attack,
        environment={attack: [attack]},
        config=attack,
        files=[(Path(attack), attack)],
    )
    assert "".join(Page(path).text).count(attack) == 10


@pytest.mark.skipif(CHROMIUM is None and "GITHUB_ACTIONS" not in os.environ, reason="no browser here")
def test_page_opens_in_a_browser_without_network(finished, tmp_path):
    from PIL import Image

    assert CHROMIUM, "GitHub's machines have one: there the page is always looked at"
    page, shot = finished[0] / "CartPole-v1" / "version_0" / "report.html", tmp_path / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path}", "--window-size=1150,3600", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    picture = Image.open(shot).convert("RGB")
    # Each third of the page: curves, pairs, tables have been drawn, in colour.
    for top in (0, 1200, 2400):
        assert len(picture.crop((0, top, 1150, top + 1200)).getcolors(10**6)) > 50


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_is_one_that_wandb_runs_and_this_program_understands(path, tmp_path, monkeypatch, capsys):
    """Keys are those of W&B's schema of sweeps; what its agent would type is parsed by our command line."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] in ("grid", "random", "bayes")
    assert set(sweep) <= {"method", "metric", "parameters", "command", "run_cap", "early_terminate"}
    assert sweep["metric"] == {"name": "val/return", "goal": "maximize"}
    chosen = {}
    for name, entry in sweep["parameters"].items():
        if sweep["method"] == "grid":
            assert set(entry) == {"values"}, "a grid needs finitely many"
        assert set(entry) in ({"values"}, {"distribution", "min", "max"})
        assert entry.get("distribution", "uniform") in ("uniform", "int_uniform", "log_uniform_values")
        chosen[name] = entry["values"][-1] if "values" in entry else (entry["min"] + entry["max"]) / 2
        chosen[name] = int(chosen[name]) if entry.get("distribution") == "int_uniform" else chosen[name]
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in chosen.items()}})
    command = [flags["args"] if part == "${args}" else [part] for part in create_sweep_command(sweep["command"])]
    typed = [word for words in command for word in words]
    assert typed[:3] == ["${env}", "lightning", "fit"]
    monkeypatch.chdir(CONF.parent)
    with pytest.raises(SystemExit) as exit_:
        main([*typed[2:], "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for name, value in chosen.items():
        found = {**printed, "model": printed["model"]["init_args"]}
        for key in name.split("."):
            found = found[key]
        assert found == value, name
