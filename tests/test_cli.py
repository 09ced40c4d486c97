"""The commands as users type them, each in a process of its own or through the same entry point."""

import csv
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import probes  # noqa: F401  registers the probe environments
import pytest
import torch
import yaml
from torch import nn

from lightning_distill import PPO, MetaPPO, load
from lightning_distill.cli import main
from lightning_distill.families import HELD_OUT
from lightning_distill.matching import trained_family
from lightning_distill.mixtures import members

CONF = Path(__file__).parents[1] / "conf"
QUICK = [
    "--data.env_steps=8_000",
    "--data.num_envs=32",
    "--data.rollout_length=50",
    "--data.val_learners=4",
    "--data.test_learners=8",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--report.pictures=false",
]


def lightning(*args, monkeypatch, **kwargs):
    monkeypatch.setattr(sys, "argv", ["lightning", *map(str, args)])
    main(**kwargs)


def refused(capsys, monkeypatch, *args):
    """The message of a call that must fail, and fail soon."""
    with pytest.raises(SystemExit) as exit_:
        lightning(*args, monkeypatch=monkeypatch)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("config", [["--config", "conf/cartpole_3d.yaml"], ["--config=conf/cartpole_3d.yaml"]])
def test_shipped_configs_are_found_from_anywhere(here, monkeypatch, capsys, config):
    with pytest.raises(SystemExit) as exit_:
        lightning("fit", *config, "--print_config", monkeypatch=monkeypatch)
    assert exit_.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["env"] == "CartPole3D-v0"


def test_a_config_where_the_command_is_typed_comes_first(here, monkeypatch, capsys):
    (here / "conf").mkdir()
    (here / "conf" / "cartpole_3d.yaml").write_text("data: {env: Acrobot-v1}")
    with pytest.raises(SystemExit):
        lightning("fit", "--config=conf/cartpole_3d.yaml", "--print_config", monkeypatch=monkeypatch)
    assert yaml.safe_load(capsys.readouterr().out)["data"]["env"] == "Acrobot-v1"


def test_the_best_is_tested_whatever_else_is_kept(here, monkeypatch):
    tested = []

    @functools.wraps(L.Trainer.test)  # the command line reads its options there
    def test(*_, ckpt_path, **__):
        tested.append(Path(ckpt_path).name)

    monkeypatch.setattr(L.Trainer, "test", test)
    mine = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    options = [*QUICK, "--held_out.families=[]", mine, "--trainer.callbacks.filename=mine"]
    lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    assert list(here.rglob("mine.ckpt"))
    assert tested == ["best.ckpt"]


def steps_logged(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["env_steps"]) for row in csv.DictReader(file) if row["env_steps"]]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_bias(observation_shape, outputs):
    return nn.Sequential(nn.Linear(*observation_shape, 8), nn.Tanh(), nn.Linear(8, outputs, bias=False))


def frozen(observation_shape, outputs):
    return nn.Linear(*observation_shape, outputs).requires_grad_(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the main job, W&B and all, typed at a shell."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "lightning_distill.cli", "fit", f"--config={CONF / 'cartpole_1d.yaml'}", *QUICK]
    command.append("--report.pictures=true")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_run_leaves_all_it_promises(finished):
    folder, output = finished
    run = folder / "runs" / "CartPole-v1" / "version_0"
    for name in (
        "distilled.safetensors",
        "last.safetensors",
        "metrics.csv",
        "config.yaml",
        "pairs.png",
        "learning_curve.png",
    ):
        assert (run / name).stat().st_size > 0, name
        assert name in output
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((folder / "runs" / "wandb").glob("offline-run-*")), "nobody is logged in: offline, and no prompt"
    for family in ("in-distribution", *HELD_OUT):
        assert family in output


def test_exported_dataset_says_where_it_comes_from(finished):
    dataset = load(finished[0] / "runs" / "CartPole-v1" / "version_0" / "distilled.safetensors")
    assert (dataset.env, dataset.pairs, dataset.outputs) == ("CartPole-v1", 2, 2)
    returns = dataset.metadata["returns"]["in-distribution"]
    assert {kind: entry["learners"] for kind, entry in returns.items()} == {"sampled": 8, "greedy": 8}
    assert yaml.safe_load(dataset.metadata["config"])["fit"]["model"]["init_args"]["pairs"] == 2
    assert 1600 <= dataset.metadata["env_steps"] <= 8000


def test_metrics_hold_returns_beside_steps(finished):
    with (finished[0] / "runs" / "CartPole-v1" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [float(row["env_steps"]) for row in rows if row["env_steps"]]
    assert steps == [1600.0 * i for i in range(1, 6)]
    assert len([row for row in rows if row["val/return"]]) == 5
    assert float(rows[0]["policy/learning_rate"]) > 0


def test_a_general_dataset_reports_both_steps_and_what_was_held_out(here, monkeypatch, capsys):
    Path("general.yaml").write_text(
        "data: {env: CartPole-v1}\n"
        "model:\n"
        "  step_rule: newton\n"
        "  pairs: 5\n"
        "  family:\n"
        "    class_path: lightning_distill.Mixture\n"
        "    init_args: {families: [relu, {class_path: lightning_distill.MLP, init_args: {width: 9}}], each: 4}\n"
        "held_out: {families: [relu, gain_1], at_validation: 1}\n"
    )
    lightning("fit", "--config=general.yaml", *QUICK, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    dataset = load("runs/CartPole-v1/version_0/distilled.safetensors")
    assert (dataset.step_rule, dataset.line_search_scale) == ("newton", None)
    assert dataset.newton_ridge not in (0.0, 0.1)
    rows = ["in-distribution", "in-distribution, sgd step", "relu (trained on)", "relu (trained on), sgd step"]
    rows += ["gain_1", "gain_1, sgd step"]
    assert set(dataset.metadata["returns"]) == set(rows)
    assert all(row.split(",")[0] in output for row in rows)
    mixture = trained_family(dataset)
    assert [member.width for member in members(mixture)] == [64, 9]
    with open("runs/CartPole-v1/version_0/metrics.csv", newline="") as file:
        columns = next(csv.reader(file))
    assert "policy/newton_ridge" in columns
    assert "held_out/relu (trained on)/return" in columns
    assert "held_out/gain_1/return" not in columns
    # The same rows again, from the file alone.
    main(
        ["evaluate", "runs/CartPole-v1/version_0/distilled.safetensors", "--learners=8", "--family", "in-distribution"]
    )
    table = capsys.readouterr().out
    for row in rows[:2]:
        assert f"{dataset.metadata['returns'][row]['sampled']['mean']:.1f}" in table


def test_a_checkpoint_is_a_model_without_running_code(finished):
    path = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    module = MetaPPO.load_from_checkpoint(path, weights_only=True)
    assert module.synthetic_batch.pairs == 2
    assert torch.load(path, weights_only=True)["env"]["id"] == "CartPole-v1"


def test_a_run_goes_on_from_its_checkpoint_and_the_first_stays_whole(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.chdir(folder)
    first = folder / "runs" / "CartPole-v1" / "version_0"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    last = first / "checkpoints" / "last.ckpt"
    options = [*QUICK[1:], "--held_out.families=[]", "--data.env_steps=16_000", f"--ckpt_path={last}"]
    lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    assert steps_logged(folder / "runs" / "CartPole-v1" / "version_1") == [1600.0 * i for i in range(6, 11)]
    assert before == {path: path.read_bytes() for path in before}
    lightning("validate", "--config", CONF / "cartpole_1d.yaml", *QUICK, f"--ckpt_path={last}", monkeypatch=monkeypatch)
    assert "val/return" in capsys.readouterr().out


def test_a_finished_run_with_one_validation_goes_on_for_longer(here, monkeypatch):
    """Its last checkpoint is of the end of the epoch, which is over where ``data.env_steps`` is as before."""
    for more in ([], ["--data.env_steps=16_000", "--ckpt_path=last"]):
        options = [*QUICK, "--held_out.families=[]", "--trainer.val_check_interval=1.0", *more]
        lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    assert steps_logged(here / "runs" / "CartPole-v1" / "version_1") == [1600.0 * i for i in range(6, 11)]


#: Learners that cannot be run, or not be taught by every rule.
TWO_INPUTS = """
from torch import nn

class TwoInputs(nn.Linear):
    def __init__(self, shape, outputs):
        super().__init__(*shape, outputs)

    def forward(self, observations, more):
        return super().forward(observations)

def no_bias(shape, outputs):
    return nn.Sequential(nn.Linear(*shape, 8), nn.Tanh(), nn.Linear(8, outputs, bias=False))
"""


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_is_tested_has_to_be_said(command, capsys, monkeypatch, here):
    message = refused(capsys, monkeypatch, command, "--config", CONF / "cartpole_1d.yaml")
    assert f"ckpt_path: not given; allowed for {command}" in message
    assert not list(here.rglob("*.safetensors"))


def test_a_test_alone_does_not_write_a_best_dataset(finished, monkeypatch, capsys, here):
    last = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    options = [*QUICK, "--held_out.families=[]", f"--ckpt_path={last}"]
    lightning("test", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    assert [path.name for path in here.rglob("*.safetensors")] == ["tested.safetensors"]
    assert not list(here.rglob("*.ckpt"))
    assert "the dataset that was tested" in capsys.readouterr().out


def test_an_own_module_by_class_path_with_arguments(here, monkeypatch):
    Path("own_modules.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, observation_shape, outputs, width: int = 64):\n"
        "        super().__init__(nn.Linear(observation_shape[0], width), nn.Tanh(), nn.Linear(width, outputs))\n"
    )
    family = "{class_path: own_modules.Net, init_args: {width: 16}}"
    options = [*QUICK, f"--model.family={family}", f"--held_out.families={{same: {family}, wide: own_modules.Net}}"]
    lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    run = here / "runs" / "CartPole-v1" / "version_0"
    metadata = load(run / "distilled.safetensors").metadata
    factory = "functools.partial(own_modules.Net, width=16)"
    assert metadata["learners"] == [{"class_path": "lightning_distill.ModuleFamily", "init_args": {"factory": factory}}]
    assert {"in-distribution", "same (trained on)", "wide"} <= set(metadata["returns"])
    options += [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "--data.env_steps=9_600"]
    lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)


def test_a_scheduler_may_be_a_function(here, monkeypatch):
    Path("mine.py").write_text(
        "from torch.optim.lr_scheduler import StepLR\n"
        "def halved(optimizer, iterations) -> StepLR:\n    return StepLR(optimizer, iterations // 2, 0.5)\n"
    )
    options = [*QUICK, "--held_out.families=[]", "--model.scheduler=mine.halved"]
    lightning("fit", "--config", CONF / "cartpole_1d.yaml", *options, monkeypatch=monkeypatch)
    with (here / "runs" / "CartPole-v1" / "version_0" / "metrics.csv").open(newline="") as file:
        rates = [float(row["policy/optimizer_lr"]) for row in csv.DictReader(file) if row["policy/optimizer_lr"]]
    assert rates == pytest.approx([rates[0] * share for share in (1, 1, 0.5, 0.5, 0.25)]), "as each iteration learned"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--config", CONF / "ant.yaml", "--model.start=halfcheetah_plain"],
            ["model.start='halfcheetah_plain'", "Ant-v5"],
        ),
        (  # which is not installed
            ["--config", CONF / "ant.yaml", "--trainer.logger=[{class_path: CometLogger}]"],
            ["lightning.pytorch.loggers.CometLogger:", "comet"],
        ),
        (
            ["--config", CONF / "ant.yaml", "--model.start=ant_plan"],
            ["model.start='ant_plan'", "did you mean ant_plain"],
        ),
        (
            ["--config", CONF / "steady" / "hopper.yaml", "--model.expert=cartpole_1d_plain"],
            ["model.expert='cartpole_1d_plain'", "Hopper-v5"],
        ),
        (
            ["--config", CONF / "acrobot.yaml", "--model.family=my_package.MyNet"],
            ["my_package.MyNet", "cannot be imported"],
        ),
        (
            ["--config", CONF / "acrobot.yaml", "--data.num_envs=30"],
            ["data.num_envs=30", "multiples of model.learners=8"],
        ),
        (["--config", CONF / "acrobot.yaml", "--model.pears=3"], ["pears"]),
        (
            ["--config", CONF / "acrobot.yaml", "--model.scheduler=torch.optim.lr_scheduler.ExponentialLR"],
            ["model.scheduler", "'gamma'", "T_max"],
        ),
        (
            ["--config", CONF / "acrobot.yaml", "--trainer.gradient_clip_val=0.5"],
            ["trainer.gradient_clip_val=0.5", "model.max_grad_norm"],
        ),
        (
            ["--config", CONF / "acrobot.yaml", "--model.family=two_inputs.TwoInputs"],
            ["model.family", "missing 1 required positional argument"],
        ),
        (
            ["--config", CONF / "acrobot.yaml", "--model.family=two_inputs.no_bias", "--model.step_rule=newton"],
            ["model.family", "2.bias"],
        ),
    ],
)
def test_what_cannot_work_is_said_in_a_line_before_any_run_begins(options, words, capsys, monkeypatch, here):
    Path("two_inputs.py").write_text(TWO_INPUTS)
    message = refused(capsys, monkeypatch, "fit", *options)
    for word in words:
        assert word in message
    assert len([line for line in message.splitlines() if line.strip()]) <= 3, message
    assert not list(here.rglob("*.yaml"))
    assert not list(here.rglob("wandb"))


def test_checkpoint_of_another_environment_is_refused(finished, capsys, monkeypatch, here):
    last = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    message = refused(capsys, monkeypatch, "fit", "--config", CONF / "halfcheetah.yaml", f"--ckpt_path={last}")
    assert "CartPole-v1" in message
    assert "HalfCheetah-v5" in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.gamma=0.9", "model.gamma=0.9: the run of ckpt_path has 0.99"),
        ("--model.optimizer.init_args.lr=0.5", "model.optimizer.lr=0.5"),
        ("--model=PPO", "model='lightning_distill.PPO'"),
    ],
)
def test_other_options_than_the_checkpoints_are_refused(option, message, finished, capsys, monkeypatch, here):
    last = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    config = ["--config", CONF / "cartpole_1d.yaml", "--model.pairs=2"]  # the checkpoint's own
    found = refused(capsys, monkeypatch, "fit", *config, option, f"--ckpt_path={last}")
    assert message in found
    assert "--model.start=FILE" in found


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--model.family=relu",
            "model.family='relu': the run of ckpt_path has 'paper', and is tested as it was trained",
        ),
        ("--model.step_rule=newton", "model.step_rule='newton': the run of ckpt_path has 'sgd'"),
        ("--model=PPO", "model='lightning_distill.PPO': the run of ckpt_path has 'lightning_distill.MetaPPO'"),
    ],
)
def test_what_is_tested_is_the_checkpoints(command, option, message, finished, capsys, monkeypatch, here):
    last = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    config = ["--config", CONF / "cartpole_1d.yaml", *QUICK, f"--ckpt_path={last}"]
    assert message in refused(capsys, monkeypatch, command, *config, option)


def test_a_config_file_beside_a_tested_checkpoint_may_say_what_it_likes(finished, capsys, monkeypatch, here):
    """As where the run was given more than its config file says."""
    last = finished[0] / "runs" / "CartPole-v1" / "version_0" / "checkpoints" / "last.ckpt"
    options = [
        *QUICK,
        f"--ckpt_path={last}",
        "--model.family=paper",
        "--model.compile=true",
    ]  # its own, and one of speed
    lightning("validate", "--config", CONF / "cartpole_1d_512.yaml", *options, monkeypatch=monkeypatch)
    assert "val/return" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (["--trainer.logger=false", "--trainer.default_root_dir=mine"], "trainer.default_root_dir='mine'"),
        (["--trainer.logger=WandbLogger", "--trainer.logger.save_dir=mine"], "trainer.logger.save_dir='mine'"),
    ],
)
def test_without_folders_one_run_does_not_take_the_place_of_another(logger, folder, capsys, monkeypatch, here):
    Path("mine").mkdir()
    Path("mine", "config.yaml").touch()
    found = refused(capsys, monkeypatch, "fit", "--config", CONF / "cartpole_1d.yaml", *logger)
    assert f"{folder}: has a config.yaml already" in found
    assert not list(here.rglob("wandb"))


def test_a_runs_config_writes_where_it_is_told_and_goes_on_there(finished, capsys, monkeypatch, here):
    config = finished[0] / "runs" / "CartPole-v1" / "version_0" / "config.yaml"
    elsewhere = [f"--config={config}", "--trainer.default_root_dir=elsewhere", "--held_out.families=[]"]
    lightning("fit", *elsewhere, "--ckpt_path=last", monkeypatch=monkeypatch)
    assert "starting from the beginning" in capsys.readouterr().out
    lightning("fit", *elsewhere, "--ckpt_path=last", "--data.env_steps=9_600", monkeypatch=monkeypatch)
    run = Path("elsewhere", "CartPole-v1", "version_0")
    assert f"going on from {run}" in capsys.readouterr().out
    assert not Path("runs").exists()
    printed = printed_config(capsys, monkeypatch, "--config", run / "config.yaml", "--data.env=Acrobot-v1")
    (here / "printed.yaml").write_text(yaml.safe_dump(printed))
    lightning(
        "fit",
        "--config=printed.yaml",
        *QUICK,
        "--held_out.families=[]",
        "--data.env_steps=1600",
        monkeypatch=monkeypatch,
    )
    assert Path("elsewhere", "Acrobot-v1", "version_0", "config.yaml").is_file()


def test_last_is_looked_for_where_the_first_logger_writes(capsys, monkeypatch, here):
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine", "--trainer.logger.name=named"]
    options = ["--config", CONF / "cartpole_1d.yaml", *QUICK, "--held_out.families=[]", *logger]
    lightning("fit", *options, "--data.env_steps=3200", monkeypatch=monkeypatch)
    lightning("fit", *options, "--ckpt_path=last", monkeypatch=monkeypatch)
    assert "going on from mine/named/version_0/checkpoints/last.ckpt" in capsys.readouterr().out


def test_direct_ppo_is_trained_validated_and_tested_by_the_same_commands(here, monkeypatch, capsys):
    config = CONF / "ppo" / "cartpole_1d.yaml"
    lightning("fit", "--config", config, *QUICK, "--report.pictures=true", monkeypatch=monkeypatch)
    run = here / "runs" / "CartPole-v1" / "version_0"
    output = capsys.readouterr().out
    for words in ("trained policy", "8 runs of the one trained policy", "learning_curve.png", "metrics.csv"):
        assert words in output
    assert not list(here.rglob("*.safetensors")), "a policy is no dataset"
    assert "class_path: lightning_distill.PPO" in (run / "config.yaml").read_text()
    last = run / "checkpoints" / "last.ckpt"
    assert isinstance(PPO.load_from_checkpoint(last, weights_only=True), PPO)
    for command, words in (("validate", "val/return"), ("test", "trained policy")):
        options = [*QUICK, "--report.pictures=true", f"--ckpt_path={last}"]
        lightning(command, "--config", config, *options, monkeypatch=monkeypatch)
        assert words in capsys.readouterr().out
    assert [path.parent for path in here.rglob("learning_curve.png")] == [run], "a test alone has no curve"


def printed_config(capsys, monkeypatch, *args):
    with pytest.raises(SystemExit) as exit_:
        lightning("fit", *args, "--print_config", monkeypatch=monkeypatch)
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_another_model_brings_its_own_defaults(capsys, monkeypatch, here):
    config = ["--config", CONF / "acrobot.yaml", "--model.clip=0.3"]
    distilling = printed_config(capsys, monkeypatch, *config)["model"]
    direct = printed_config(capsys, monkeypatch, *config, "--model=PPO", "--model.gae_lambda=0.9")["model"]
    assert distilling["class_path"].endswith(".MetaPPO")
    assert direct["class_path"].endswith(".PPO")
    assert distilling["init_args"]["pairs"] == 4
    assert "pairs" not in direct["init_args"]
    assert (direct["init_args"]["clip"], direct["init_args"]["gae_lambda"]) == (0.3, 0.9), "said by the user: kept"
    assert (distilling["init_args"]["target_kl"], direct["init_args"]["target_kl"]) == (0.05, math.inf)
    assert (distilling["init_args"]["final_noise"], direct["init_args"]["final_noise"]) == (0.1, 1.0)


@pytest.mark.parametrize("model", ["MetaPPO", "PPO"])
def test_an_environment_of_ones_own_needs_a_config_and_no_code(model, here, monkeypatch, capsys):
    """A module in the working directory registers it; ``module:id`` is Gymnasium's way to say so."""
    Path("my_worlds.py").write_text(MY_WORLDS)
    Path("mine.yaml").write_text("data: {env: 'my_worlds:Point-v0', num_envs: 8}\nmodel: {family: linear}\n")
    options = [*QUICK[2:], "--data.num_envs=8", "--data.env_steps=2_000", "--held_out.families=[]", f"--model={model}"]
    lightning("fit", "--config=mine.yaml", *options, monkeypatch=monkeypatch)
    assert "my_worlds:Point-v0" in capsys.readouterr().out
    if model == "MetaPPO":
        (path,) = here.rglob("distilled.safetensors")
        dataset = load(path)
        assert (dataset.env, dataset.observation_shape, dataset.outputs) == ("my_worlds:Point-v0", (2, 3), 2)


#: Observations with two dimensions, of float64, and actions with bounds of their own each.
MY_WORLDS = """
import gymnasium, numpy as np
from gymnasium.spaces import Box

class Point(gymnasium.Env):
    observation_space = Box(-np.inf, np.inf, (2, 3), np.float64)
    action_space = Box(np.array([-1, -3], np.float32), np.array([2, 3], np.float32))

    def __init__(self):
        self.left = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 10
        return self.np_random.normal(size=(2, 3)), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32))
        self.left -= 1
        return self.np_random.normal(size=(2, 3)), -float(np.square(action).sum()), False, self.left == 0, {}

gymnasium.register("Point-v0", Point)
"""


EXPERIMENTS = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name not in ("sweeps", "pipelines"))


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_shipped_config_runs(config, here, monkeypatch, caplog):
    options = (
        ["--held_out.at_validation=0"]
        if "held_out" in yaml.safe_load(config.read_text())
        else ["--held_out.families=[]"]
    )
    if config.parent.name == "atari":  # a learner that never serves plays on for ever
        options.append("--data.env_kwargs.max_num_frames_per_episode=400")
    lightning(
        "fit",
        "--config",
        config,
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        # As short as may be, one pass over it, validated by two of the learners that it trains: what is tried is the config.
        "--data.rollout_length=25",
        "--model.epochs=1",
        "--data.val_learners=2",
        *options,
        monkeypatch=monkeypatch,
    )
    assert not list(here.rglob("*.safetensors")), "a development run leaves nothing behind"
    assert not [text for text in caplog.messages if "no effect" in text]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.env=Foo-v9"], ["data.env", "Foo-v9"]),
        (["--data.env=ProbeAnyLength-v0"], ["ProbeAnyLength-v0", "observation space", "Box"]),
        (["--model.family=nope"], ["family", "nope", "relu"]),
        (["--held_out.families=[nope]"], ["family", "nope", "relu"]),
        (["--held_out.families={mine: torch.nn.ReLU}"], ["held_out.families", "mine"]),
        (["--held_out.families={in-distribution: relu}"], ["held_out.families", "in-distribution", "another row"]),
        (["--ckpt_path=best"], ["ckpt_path='best'", "no such file"]),
        (
            ["--held_out.families=[relu, test_cli.no_bias]", "--held_out.at_validation=0", "--model.step_rule=newton"],
            ["held_out.families", "test_cli.no_bias", "cannot be taught by newton", "2.bias"],
        ),
        (["--model.family=test_cli.frozen"], ["model.family", "no trainable parameter"]),
        (["--seed_everything=-3"], ["seed_everything=-3", "from 0"]),
        (["--seed_everything=true"], ["seed_everything=True", "false for none"]),
        (["--trainer.devices=0"], ["trainer.devices='0'"]),
        (["--trainer.strategy=fsdp", "--trainer.accelerator=cpu"], ["error: trainer: ", "fsdp"]),
        (["--data.env=Pong-v5"], ["did you mean", "ALE/Pong-v5"]),
        (["--model.optimizer.init_args.lr=-1"], ["error: model.optimizer: ", "-1.0", "allowed"]),
        (["--model.step_rule=adam"], ["model.step_rule", "adam", "line_search"]),
        (["--model.newton_ridge=-1"], ["model.newton_ridge", "-1"]),
        (["--model.pairs=0"], ["model.pairs", "0", ">0"]),
        (["--data.num_envs=-3"], ["data.num_envs", "-3"]),
        (["--data.num_envs=30"], ["data.num_envs=30", "model.learners=8"]),
        (["--model.pears=3"], ["model.pears"]),
        (["--model.minibatches=9999"], ["model.minibatches=9999: a rollout has ", "samples of each learner"]),
        (["--model.gamma=1.5"], ["model.gamma", "1.5"]),
        (["--model=PPO", "--model.pairs=3"], ["model.pairs", "PPO"]),
        (["--model=Imitation"], ["error: model.expert: not given, and needed"]),
        (["--model=Distillation"], ["error: model=Distillation: allowed are MetaPPO, PPO, Imitation, or "]),
        (["--model=PPP"], ["error: model=PPP: allowed are MetaPPO, PPO, Imitation, or "]),
        (["--model.pairs=0"], ["error: model.pairs=0: Not of type PositiveInt: does not conform to restriction v>0\n"]),
        (["--data.env_kwargs=5"], ["error: data.env_kwargs=5: Expected a dict\n"]),
        (
            ["--model.family={class_path: Mixture, init_args: {families: [paper, relu], weights: [1]}}"],
            ["error: Mixture.weights=[1.0]: allowed are 2 positive numbers, one a family\n"],
        ),
        (
            [
                "--held_out.families={a: {class_path: Mixture, init_args: {families: [{class_path: MLP, init_args: {width: -8}}]}}}"
            ],
            ["error: MLP.width=-8: allowed are integers ≥ 1\n"],
        ),
        (
            ["--model.family=MLP", "--model.family.activation=rlu"],
            ["error: model.family.activation: Expected a Literal['tanh'"],
        ),
        (
            ["--held_out.families={a: {class_path: MLP, init_args: {wdth: 8}}}"],
            ["wdth", "--held_out.families.NAME="],
        ),
        (
            ["--held_out.families.a={class_path: MLP, init_args: {wdth: 8}}"],
            ["error: Option 'held_out.families.wdth' is not accepted by lightning_distill.MLP\n"],
        ),
        (["--model.optimizer=Adm"], ["error: model.optimizer=Adm: neither a class path nor the name of a class"]),
        (["--model.optimizer.lrr=1"], ["error: Option 'model.optimizer.lrr' is not accepted by torch.optim.Adam\n"]),
        (["--trainer.callbacks=EarlyStopping"], ["error: trainer.callbacks.monitor: not given, and needed by "]),
        (["--model.lifetime=null"], ["error: model.lifetime=None: ", "allowed is PositiveInt\n"]),
        (
            ["--checkpoint.monitor=val/retrun"],
            ["error: checkpoint.monitor='val/retrun': ", "val/return, val/return_worst"],
        ),
        (["--trainer.overfit_batches=1"], ["error: trainer.overfit_batches=1", "data.env_steps says how long"]),
        (["--trainer.limit_train_batches=0"], ["error: trainer.limit_train_batches=0", "data.env_steps"]),
        (["--trainer.val_check_interval=0"], ["error: trainer.val_check_interval=0: ", "trainer.limit_val_batches=0"]),
        (["--trainer.val_check_interval=9999"], ["error: trainer.val_check_interval=9999:"]),
        (["--config=missing.yaml"], ["missing.yaml"]),
        (["--trainer.default_root_dir=/proc/nowhere"], ["trainer.default_root_dir", "/proc/nowhere"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_named_at_once(options, words, capsys, monkeypatch, here):
    message = refused(capsys, monkeypatch, "fit", "--config", CONF / "cartpole_1d.yaml", *options)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        (
            "cartpole_1d.yaml",
            ["--model.log_std=1", "--model.newton_ridge=2", "--model.learning_rate=0.5", "--data.env_steps=100"],
            {
                "model.log_std=1.0 has no effect: actions are discrete",
                "model.newton_ridge=2.0 has no effect: model.step_rule='sgd' has none",
                "data.env_steps=100: a run has at least one iteration, which is of 1600 steps (data.num_envs=32 × data.rollout_length=50)",
            },
        ),
        (
            "cartpole_1d.yaml",
            ["--model.start=cartpole_1d_plain", "--model.learning_rate=0.5", "--model.observation_gain=2"],
            {
                "model.learning_rate=0.5 has no effect: model.start has its own",
                "model.observation_gain=2.0 has no effect: model.start has its own",
            },
        ),
        (
            "ppo/cartpole_1d.yaml",
            ["--held_out.families=[relu]"],
            {"held_out.families=['relu'] has no effect: direct RL teaches nobody else"},
        ),
    ],
)
def test_options_without_effect_are_told(config, options, told, monkeypatch, here, caplog):
    options = [*QUICK, "--data.env_steps=1600", "--held_out.families=[]", "--trainer.limit_test_batches=0", *options]
    lightning("fit", "--config", CONF / config, *options, monkeypatch=monkeypatch)
    assert told == {text for text in caplog.messages if "no effect" in text or "at least one iteration" in text}


def test_misspelt_key_in_a_config_file_is_named(capsys, monkeypatch, here):
    Path("typo.yaml").write_text("data: {env: CartPole-v1}\nmodel: {pears: 2}\n")
    assert "pears" in refused(capsys, monkeypatch, "fit", "--config=typo.yaml")


def test_interpolation_sees_what_the_command_line_says(capsys, monkeypatch, here):
    Path("mine.yaml").write_text("data: {env: Ant-v5}\ntrainer: {default_root_dir: 'runs/${data.env}'}\n")
    printed = printed_config(capsys, monkeypatch, "--config=mine.yaml", "--data.env=Ant-v4")
    assert printed["trainer"]["default_root_dir"] == "runs/Ant-v4"
    assert printed["trainer"]["logger"][0]["init_args"]["name"] == "${.....data.env}", (
        "to follow another environment, too"
    )


def test_help_needs_no_simulator():
    code = (
        "import sys; from lightning_distill.cli import main\n"
        "try: main(['fit', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torchrl', 'gymnasium', 'mujoco', 'envpool'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--model.pairs" in done.stdout
