"""The commands, as they are typed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import gymnasium
import pytest
import torch
from handmade import make_dataset
from PIL import Image

from lightning_distill import MLP, ConfigError, dataset, evaluate, watching
from lightning_distill.cli import main
from lightning_distill.envs.rendering import make_rendered
from lightning_distill.families import FAMILIES, HELD_OUT, family_named
from lightning_distill.returns import Evaluation, as_returns
from lightning_distill.shell import COMMANDS


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A dataset for cart-pole, in the working directory."""
    monkeypatch.chdir(tmp_path)
    returns = as_returns({"in-distribution": {"sampled": Evaluation(torch.tensor([[90.0], [110.0]]), False)}})
    metadata = {"command": "lightning fit --config conf/tiny.yaml", "returns": returns}
    return str(make_dataset("CartPole-v1", 3, metadata=metadata).save("tiny.safetensors"))


def read_json(capsys):
    return json.loads(capsys.readouterr().out)


def fails(capsys, *args: str) -> str:
    """The one line on standard error of a command that ends with exit code 2 and says nothing else."""
    with pytest.raises(SystemExit) as ended:
        main([*args])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


def test_help_names_every_command(capsys):
    for args in (["--help"], []):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == (0 if args else 2)
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in ("fit", "validate", "test", *COMMANDS))
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_light_commands_import_nothing_heavy(path):
    code = f"""
import sys
from lightning_distill.cli import main
for args in (["list"], ["show", {path!r}], ["show", {path!r}, "--json"], ["evaluate", "--help"], ["--help"]):
    try:
        main(args)
    except SystemExit:
        pass
heavy = {{"lightning", "torchrl", "gymnasium", "mujoco", "wandb", "matplotlib"}} & set(sys.modules)
sys.exit(", ".join(sorted(heavy)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_evaluate_tells_what_the_api_tells(path, capsys):
    main(["evaluate", path, "--learners", "5", "--episodes", "2", "--seed", "3", "--greedy", "--json"])
    told = read_json(capsys)
    assert (told["env"], told["pairs"], told["seed"]) == ("CartPole-v1", 3, 3)
    entry = told["returns"]["in-distribution"]["greedy"]
    expected = evaluate(dataset.load(path), learners=5, episodes=2, seed=3, greedy=True)
    assert entry["mean"] == pytest.approx(expected.mean)
    assert entry["ci95"] == pytest.approx(expected.ci95)
    assert (entry["learners"], entry["episodes"]) == (5, 2)


def test_evaluate_families_and_controls(path, capsys):
    main(["evaluate", path, "--learners", "3", "--controls", "--json", "--family", "in-distribution", "relu"])
    returns = read_json(capsys)["returns"]
    controls = [f"control: {name}" for name in ("untaught", "shuffled targets", "random actions")]
    assert list(returns) == ["in-distribution", "relu", *controls]
    mean = {row: entry["sampled"]["mean"] for row, entry in returns.items()}
    assert returns["relu"]["sampled"]["share"] == pytest.approx(mean["relu"] / mean["in-distribution"])
    main(["evaluate", path, "--learners", "3", "--controls", "--family", "in-distribution", "relu"])
    table = capsys.readouterr().out
    assert all(f"{row}" in table and f"{value:.1f}" in table for row, value in mean.items())


def test_evaluate_by_another_step_rule(path, capsys):
    main(["evaluate", path, "--learners", "4", "--step_rule", "line_search", "--json", "--family", "width_512"])
    returns = read_json(capsys)["returns"]
    assert list(returns) == ["width_512, line_search step"]
    loaded = dataset.load(path)
    found = evaluate(loaded, family=family_named("width_512"), learners=4, step_rule="line_search")
    assert returns["width_512, line_search step"]["sampled"]["mean"] == pytest.approx(found.mean)
    assert "the dataset has no newton_ridge" in fails(capsys, "evaluate", path, "--step_rule", "newton")
    assert "allowed are sgd, line_search, newton, projection; this dataset has the numbers of sgd" in fails(
        capsys, "evaluate", path, "--step_rule", "adam"
    )


def test_evaluate_held_out_families(path, capsys):
    main(["evaluate", path, "--learners", "2", "--held_out", "--json"])
    assert list(read_json(capsys)["returns"]) == ["in-distribution", *HELD_OUT]
    trained = dataset.load(path).with_metadata(learners=[family_named("relu").describe()])
    trained.save(path)
    main(["evaluate", path, "--learners", "2", "--held_out", "--json"])
    rows = ["relu (trained on)" if name == "relu" else name for name in HELD_OUT]
    assert list(read_json(capsys)["returns"]) == ["in-distribution", *rows]


def test_json_of_one_learner_has_no_infinity(path, capsys):
    main(["evaluate", path, "--learners", "1", "--json"])
    assert read_json(capsys)["returns"]["in-distribution"]["sampled"]["ci95"] is None


def test_a_family_of_ones_own(path, tmp_path, capsys):
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "from lightning_distill import MLP\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, shape, outputs):\n"
        "        super().__init__(nn.Linear(shape[0], 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, outputs))\n"
        "class Family(MLP):\n"
        "    pass\n"
        "narrow = MLP(width=4)\n"
        "number = 3\n"
    )
    main(["evaluate", path, "--learners", "2", "--json", "--family", "my_nets.Net", "my_nets.Family", "my_nets.narrow"])
    assert list(read_json(capsys)["returns"]) == ["my_nets.Net", "my_nets.Family", "my_nets.narrow"]
    assert "is a int" in fails(capsys, "evaluate", path, "--family", "my_nets.number")
    assert "cannot be imported" in fails(capsys, "evaluate", path, "--family", "my_nets.nothing")
    assert "cannot be made for observations [4]" in fails(capsys, "evaluate", path, "--family", "torch.nn.Linear")


def test_family_names():
    assert family_named("paper").describe() == MLP().describe()
    assert family_named("width_256").describe() == MLP(width=256).describe()
    drawn = {name: family_named(name).describe()["init_args"] for name in FAMILIES}
    assert len({str(arguments) for arguments in drawn.values()}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["evaluate", "nothing"], ["nothing", "not in the zoo"]),
        (["evaluate", "tiny.safetensors", "--learners", "0"], ["learners=0", "≥ 1"]),
        (["evaluate", "tiny.safetensors", "--learners", "many"], ["error: learners: Expected a int. Got value: many"]),
        (["evaluate", "tiny.safetensors", "--family", "huge"], ["family='huge'", "width_256", "class path"]),
        (["evaluate", "tiny.safetensors", "--env", "Nope-v1"], ["env='Nope-v1'", "Allowed"]),
        (["evaluate", "tiny.safetensors", "--env", "CartPole2D-v0"], ["(4,)", "needs (8,)"]),
        (["evaluate", "tiny.safetensors", "--sticky_actions", "2"], ["sticky_actions=2", "[0, 1)"]),
        (["evaluate", "tiny.safetensors", "--backend", "fast"], ["backend", "fast", "gymnasium"]),
        (["evaluate"], ["required", "dataset"]),
        (["evaluate", "tiny.safetensors", "--greedily"], ["--greedily"]),
        (["show", "tiny.safetensors", "-o", "pairs.doc"], ["pairs.doc", ".png"]),
        (["watch", "tiny.safetensors", "-o", "video.avi"], ["video.avi", ".gif"]),
        (["watch", "tiny.safetensors", "--steps", "0"], ["steps=0", "≥ 1"]),
        (["import", "tiny.safetensors", "--env", "CartPole-v1"], ["required", "output"]),
        (
            ["import", "tiny.safetensors", "--env", "CartPole-v1", "-o", "x"],
            ["tiny.safetensors", "expected x, y, inner_lr"],
        ),
        (["import", "nothing.pt", "--env", "CartPole-v1", "-o", "x"], ["nothing.pt: no such file"]),
        (["import", "nothing.pt", "--env", "CartPole-v1", "-o", "x", "--evaluate", "-1"], ["evaluate=-1", "≥ 0"]),
        (["play", "tiny.safetensors"], ["command='play'", "watch"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(path, capsys, args, told):
    line = fails(capsys, *args)
    assert all(part in line for part in told), line


def test_show(path, capsys):
    main(["show", path, "-o", "pictures/pairs.png"])
    out = capsys.readouterr().out
    assert "3 pairs for CartPole-v1" in out
    assert "return 100.0" in out
    first = dataset.load(path).observations[0, 0].item()
    assert f"{first:.2f}" in out
    with Image.open("pictures/pairs.png") as image:
        assert image.width > 1000


def test_show_abbreviates_long_tables(tmp_path, capsys):
    wide = make_dataset("HalfCheetah-v5", 40).save(tmp_path / "wide.safetensors")
    main(["show", str(wide)])
    out = capsys.readouterr().out
    assert "and 24 more pairs" in out
    assert "… 9 more" in out


def test_show_json_holds_all(path, capsys):
    config = "fit:\n  seed: 1\n"
    pairs = dataset.load(path).with_metadata(config=config)
    main(["show", str(pairs.save("configured.safetensors")), "--json"])
    told = read_json(capsys)
    assert told["metadata"]["config"] == config
    assert torch.equal(torch.tensor(told["observations"]), pairs.observations)
    assert torch.equal(torch.tensor(told["targets"]), pairs.targets)
    assert told["learning_rate"] == pairs.learning_rate.item()
    assert told["metadata"]["command"].startswith("lightning fit")


def test_watch_records_an_episode(path, capsys):
    main(["watch", path, "-o", "tiny.gif", "--json"])
    told = read_json(capsys)
    assert told["path"] == "tiny.gif"
    assert told["return"] == told["steps"] > 0  # one for every step
    with Image.open("tiny.gif") as video:
        assert video.n_frames == pytest.approx(1 + told["steps"] / 2, abs=1)  # 25 of 50 frames a second
        assert video.info["duration"] == 40
    main(["watch", path, "-o", "two.gif", "--seed", "2", "--greedy", "--steps", "4", "--family", "depth_1", "--json"])
    assert read_json(capsys)["steps"] == 4
    main(["watch", path, "-o", "three.GIF", "--json"])
    again = read_json(capsys)
    assert again["steps"] == told["steps"]


def test_ant_plays_in_the_version_before(capsys):
    """Which takes none of the arguments that the dataset's own was made with."""
    main(["evaluate", "ant_plain", "--env", "Ant-v4", "--learners", "2", "--step_rule", "sgd", "--json"])
    assert read_json(capsys)["env"] == "Ant-v4"


def test_watch_writes_a_gif_where_mp4_cannot_be_written(path, capsys, monkeypatch, caplog):
    find = watching.importlib.util.find_spec
    monkeypatch.setattr(
        watching.importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name)
    )
    main(["watch", path, "-o", "video.mp4", "--steps", "2"])
    assert capsys.readouterr().out.startswith("video.gif: 2 steps")
    assert "pip install imageio-ffmpeg" in caplog.text
    line = fails(capsys, "watch", path, "-o", "video.mp4", "--steps", "1")
    assert "'video.gif' is there already" in line, "which nobody named"
    with Image.open("video.gif") as video:
        assert video.size == (608, 176)


def test_watch_says_what_to_install_without_opengl(tmp_path, monkeypatch, capsys):
    made = make_dataset("InvertedPendulum-v5").save(tmp_path / "pendulum.safetensors")
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    import mujoco  # noqa: F401  which reads the variable too, when it is imported

    line = fails(capsys, "watch", str(made), "-o", str(tmp_path / "video.gif"))
    assert "MUJOCO_GL=osmesa" in line


def test_watch_says_that_torchrl_environments_cannot_be_drawn():
    with pytest.raises(ConfigError, match=r"env='torchrl.envs.GymEnv' is a TorchRL environment, which cannot be drawn"):
        make_rendered("torchrl.envs.GymEnv", {"env_name": "Pendulum-v1"})


def test_watch_says_that_an_environment_takes_no_render_mode():
    class Undrawn(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2)

        def __init__(self):
            """Takes nothing."""

    gymnasium.register("Undrawn-v0", Undrawn)
    with pytest.raises(ConfigError, match=r"env='Undrawn-v0' cannot be drawn: its constructor takes no render_mode"):
        make_rendered("Undrawn-v0")


def test_list(path, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dataset, "zoo", lambda: {"tiny": tmp_path / path})
    main(["list", "--json"])
    (entry,) = read_json(capsys)
    assert (entry["name"], entry["env"], entry["pairs"]) == ("tiny", "CartPole-v1", 3)
    assert entry["file_bytes"] == (tmp_path / path).stat().st_size
    assert entry["returns"]["in-distribution"]["sampled"]["mean"] == 100
    main(["list"])
    out = capsys.readouterr().out
    assert "tiny: lightning fit --config conf/tiny.yaml" in out
    assert "100.0 ± " in out
    assert "sgd" in out


def test_an_empty_zoo(monkeypatch, capsys):
    monkeypatch.setattr(dataset, "zoo", dict)
    main(["list", "--json"])
    assert read_json(capsys) == []


def test_an_installation_without_dependencies_says_so(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jsonargparse" else find(name))
    assert "without its dependencies" in fails(capsys, "list")


def test_version_names_what_a_result_depends_on(capsys):
    main(["--version"])
    lines = dict(line.split(" ") for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert {"python", "lightning-distill", "gymnasium"} <= lines.keys()
