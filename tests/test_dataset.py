"""The file of a distilled dataset: what is written comes back, strangers can use it, and nothing broken gets in."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from handmade import make_dataset
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DatasetError, load, teach

RETURNS = {"in-distribution": {"greedy": {"mean": 12.5, "ci95": 0.5, "learners": 16, "episodes": 1}}}
CONTENT = {
    "observations": torch.zeros(3, 4),
    "targets": torch.zeros(3, 2),
    "learning_rate": torch.tensor(0.5),
    "observation_mean": torch.zeros(4),
    "observation_std": torch.ones(4),
}
METADATA = {
    "format": "1",
    "env": "CartPole-v1",
    "action_type": "discrete",
    "loss": "mse",
    "steps": "1",
    "observation_clip": "10.0",
}


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "HalfCheetah-v5"])
def test_round_trip(tmp_path, env):
    metadata = {
        "env_kwargs": {"reset_noise_scale": 0.2},
        "learners": [{"class_path": "lightning_distill.MLP", "init_args": {"width": 32}}],
        "returns": RETURNS,
        "versions": {"torch": torch.__version__},
        "env_steps": 12345,
        "seed": 3,
        "config": "model:\n\tpairs: 8\n",
        "created": "2025-01-01T00:00:00+00:00",
        "license": "MIT",
        "remark": "kept as it is",
    }
    saved = make_dataset(env, observation_clip=5.0, metadata=metadata)
    loaded = load(saved.save(tmp_path / "a.safetensors"))
    for name in (*CONTENT, "log_std"):
        first, second = getattr(saved, name), getattr(loaded, name)
        assert (first is None and second is None) or torch.equal(first, second), name
    assert (loaded.env, loaded.action_type, loaded.observation_clip) == (env, saved.action_type, 5.0)
    assert loaded.metadata == {**metadata, "step_rule": "sgd", "encoder_level": "0"}
    assert loaded.env_kwargs == {"reset_noise_scale": 0.2}
    assert "return 12.5 ± 0.5 (in-distribution, greedy, 16 fresh learners × 1 episodes)" in repr(loaded)


def test_encoder_and_step_rule_scalars_travel(tmp_path):
    encoder = {"0.weight": torch.randn(2, 4, 3, 3), "0.bias": torch.randn(2)}
    saved = make_dataset(
        encoder=encoder,
        line_search_scale=torch.tensor(0.9),
        newton_ridge=torch.tensor(0.01),
        metadata={"encoder_level": "1", "step_rule": "line_search"},
    )
    loaded = load(saved.save(tmp_path / "a.safetensors")).to("cpu").with_metadata(license="MIT")
    assert loaded.encoder_level == 1
    assert loaded.step_rule == "line_search"
    assert loaded.line_search_scale == torch.tensor(0.9)
    assert loaded.newton_ridge == torch.tensor(0.01)
    assert loaded.encoder.keys() == encoder.keys()
    assert all(torch.equal(loaded.encoder[name], value) for name, value in encoder.items())


def test_pairs_feed_a_data_loader():
    dataset = make_dataset(pairs=10)
    for view in (dataset, dataset.as_torch()):
        batches = list(DataLoader(view, batch_size=4))
        assert [len(observations) for observations, _ in batches] == [4, 4, 2]
        assert torch.equal(torch.cat([observations for observations, _ in batches]), dataset.observations)
        assert torch.equal(torch.cat([targets for _, targets in batches]), dataset.targets)
    shuffled = DataLoader(dataset.as_torch(), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(1))
    observations, targets = next(iter(shuffled))
    order = [int((dataset.observations == row).all(1).nonzero()) for row in observations]
    assert order != list(range(10))
    assert torch.equal(targets, dataset.targets[order])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = make_dataset(pairs=3).save(tmp_path / "a.safetensors")

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            make_dataset(pairs=5).save(path)
    assert load(path).pairs == 3
    assert os.listdir(tmp_path) == ["a.safetensors"]
    make_dataset(pairs=5).save(path)
    assert load(path).pairs == 5


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    given = make_dataset()
    same = dataclasses.replace(given, observation_std=given.observation_mean.abs_().add_(1))
    same.save(tmp_path / "same.safetensors")
    assert torch.equal(load(tmp_path / "same.safetensors").observation_std, same.observation_mean)


def test_true_is_no_integer():
    with pytest.raises(DatasetError, match="seed=True: expected an integer"):
        make_dataset(metadata={"seed": True})


def test_a_loaded_dataset_is_independent_of_its_file(tmp_path):
    saved = make_dataset()
    path = saved.save(tmp_path / "a.safetensors")
    loaded = load(path)
    with path.open("r+b") as file:
        file.seek(-saved.nbytes, os.SEEK_END)
        file.write(bytes(saved.nbytes))
    assert torch.equal(loaded.observations, saved.observations)


# --- a stranger ------------------------------------------------------------------------------------------------------

# Written from the table of the file format alone.
STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning_distill":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())

import json
import gymnasium
import numpy as np
import torch
from safetensors import safe_open

dataset_path, start_path, out_path = sys.argv[1:]
with safe_open(dataset_path, "pt") as file:
    t = {name: file.get_tensor(name) for name in file.keys()}
    m = file.metadata()
assert (m["format"], m["loss"], m["steps"], m["step_rule"], m["encoder_level"]) == ("1", "mse", "1", "sgd", "0")

obs, out = t["observations"].shape[1], t["targets"].shape[1]
net = torch.nn.Sequential(torch.nn.Linear(obs, 64), torch.nn.Tanh(), torch.nn.Linear(64, out))
net.load_state_dict(torch.load(start_path, weights_only=True))

optimizer = torch.optim.SGD(net.parameters(), lr=t["learning_rate"].item())
((net(t["observations"]) - t["targets"]) ** 2).mean().backward()
optimizer.step()

env = gymnasium.make(m["env"], **json.loads(m.get("env_kwargs", "{}")))
c = float(m["observation_clip"])
s, _ = env.reset(seed=0)
actions = []
for _ in range(20):
    fed = ((torch.tensor(s, dtype=torch.float32) - t["observation_mean"]) / t["observation_std"]).clamp(-c, c)
    with torch.no_grad():
        y = net(fed)
    action = int(y.argmax()) if m["action_type"] == "discrete" else y.numpy()
    actions.append(action)
    if m["action_type"] == "continuous":
        action = np.clip(action, env.action_space.low, env.action_space.high)
    s, _, terminated, truncated, _ = env.step(action)
    if terminated or truncated:
        s, _ = env.reset()
np.save(out_path, np.array(actions))
"""


@pytest.mark.parametrize("env", ["CartPole-v1", "InvertedPendulum-v5"])
def test_a_stranger_gets_the_same_actions_from_torch_safetensors_and_gymnasium_alone(tmp_path, env):
    import gymnasium
    import numpy as np

    torch.manual_seed(0)
    # Pushes against the fall, so that actions vary: x, θ, ẋ, θ̇ near 1 mean one action, near −1 the opposite.
    observations, outputs = torch.tensor([[1.0], [-1.0]]).expand(2, 4).clone(), 2 if env == "CartPole-v1" else 1
    dataset = make_dataset(
        env,
        observations=observations,
        targets=torch.tensor([[-1.0, 1.0], [1.0, -1.0]])[:, :outputs].clone(),
        learning_rate=torch.tensor(2.0),
        observation_mean=torch.zeros(4),
        observation_std=torch.full((4,), 0.05),
    )
    dataset.save(tmp_path / "a.safetensors")
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, dataset.outputs))
    torch.save(module.state_dict(), tmp_path / "start.pt")
    (tmp_path / "stranger.py").write_text(STRANGER)
    files = [str(tmp_path / name) for name in ("stranger.py", "a.safetensors", "start.pt", "actions.npy")]
    subprocess.run([sys.executable, *files], check=True, timeout=120, cwd=tmp_path)
    theirs = np.load(tmp_path / "actions.npy")

    policy, made = teach(module, dataset), gymnasium.make(env)
    state, _ = made.reset(seed=0)
    for action in theirs:
        ours = policy(state)
        np.testing.assert_allclose(ours, action, atol=1e-5)
        if dataset.action_type == "continuous":
            action = np.clip(action, made.action_space.low, made.action_space.high)
        state, _, terminated, truncated, _ = made.step(action)
        if terminated or truncated:
            state, _ = made.reset()
    assert len(np.unique(theirs)) > 1


def test_loading_and_teaching_import_no_simulator_and_no_trainer(tmp_path):
    make_dataset().save(tmp_path / "a.safetensors")
    heavy = (
        *("lightning", "torchrl", "tensordict", "gymnasium", "mujoco", "envpool", "ale_py"),
        *("wandb", "matplotlib", "jsonargparse", "omegaconf", "rich"),
    )
    code = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {heavy}:
                    raise ImportError(f"{{name}} is not installed here")

        if sys.argv[2] == "blocked":
            sys.meta_path.insert(0, Absent())
        import torch
        import lightning_distill
        from lightning_distill import MLP, load, teach, teach_many

        dataset = load(sys.argv[1])
        policy = teach(torch.nn.Linear(17, 6), dataset)
        assert policy(torch.zeros(17), sample=True).shape == (6,)
        assert teach_many(MLP(), dataset, learners=2)(torch.zeros(2, 17)).shape == (2, 6)
        print(dataset)
        found = [name for name in {heavy} if name in sys.modules]
        assert not found, found
    """
    for mode in ("blocked", "free"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.safetensors"), mode]
        subprocess.run(command, check=True, timeout=120, cwd=tmp_path)


# --- what must not get in --------------------------------------------------------------------------------------------


def assert_refused(path, match: str) -> str:
    with pytest.raises(DatasetError, match=match) as caught:
        load(path)
    message = str(caught.value)
    assert message.isprintable(), "one line, nothing a terminal would act on"
    assert len(message.removeprefix(str(path))) <= 302
    return message


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_that_is_none_is_read(tmp_path):
    path, trap = tmp_path / "a.safetensors", tmp_path / "executed"
    assert_refused(path, "no such file, and not in the zoo")
    assert_refused("no_such_name", "no such file, and not in the zoo")
    assert_refused("cartpole_1e", "did you mean cartpole_1d")
    assert_refused("nope", "`lightning-distill list` shows what is")  # not hopper
    torch.save({"state_dict": {}}, path)
    assert_refused(path, "a checkpoint[?] A run's dataset is its distilled.safetensors")
    assert_refused("x" * 5000, "name too long")
    assert_refused(tmp_path, "not a file")
    path.write_bytes(b"")
    assert_refused(path, "not a readable safetensors file")
    path.write_bytes(pickle.dumps(Trap(trap)))
    assert_refused(path, "not a readable safetensors file")
    torch.save({"observations": Trap(trap)}, path)
    assert_refused(path, "not a readable safetensors file")
    assert not trap.exists()


def test_truncated_files_are_refused(tmp_path):
    path = make_dataset().save(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert_refused(path, "not a readable safetensors file")


def test_damaged_files_are_read_or_refused(tmp_path):
    """Whatever a few wrong bytes do, the answer is a dataset or a DatasetError."""
    path = make_dataset(metadata={"returns": RETURNS, "seed": 1}).save(tmp_path / "a.safetensors")
    whole, draw, messages = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged) // 2)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            repr(load(path))
        except DatasetError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(message.isprintable() for message in messages)


NAN = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        (CONTENT, {}, r"format=None: this version reads '1'"),
        (CONTENT, METADATA | {"format": "2"}, r"format='2': this version reads '1'"),
        (CONTENT, METADATA | {"steps": "10"}, r"steps='10'"),
        (CONTENT, METADATA | {"loss": "kl"}, r"loss='kl'"),
        (CONTENT, without(METADATA, "env"), r"metadata missing: env"),
        (CONTENT, without(METADATA, "action_type"), r"metadata missing: action_type"),
        (CONTENT, METADATA | {"action_type": "multi"}, r"action_type='multi': allowed are discrete, continuous"),
        (CONTENT, METADATA | {"action_type": "continuous"}, r"log_std: needed for continuous actions"),
        (CONTENT | {"log_std": torch.zeros(2)}, METADATA, r"log_std: needed for continuous actions, and only"),
        (CONTENT, METADATA | {"observation_clip": "ten"}, r"observation_clip='ten': expected a number"),
        (CONTENT, METADATA | {"observation_clip": "nan"}, r"observation_clip=nan: must be positive"),
        (CONTENT, METADATA | {"env": ""}, r"env='': expected a Gymnasium id"),
        (CONTENT, METADATA | {"seed": "one"}, r"seed='one': expected a number"),
        (CONTENT, METADATA | {"seed": "9" * 5000}, r"seed='999.*: expected a number"),
        (CONTENT, METADATA | {"encoder_level": "5"}, r"encoder_level='5': allowed are 0, 1, 2, 3, 4"),
        (CONTENT, METADATA | {"encoder_level": "2"}, r"encoder_level=2 with 0 tensors encoder\.\*"),
        (CONTENT | {"encoder.0.bias": torch.zeros(3)}, METADATA, r"encoder_level=0 with 1 tensors encoder\.\*"),
        (CONTENT | {"extra": torch.zeros(3)}, METADATA, r"tensors of an unknown meaning: extra"),
        (without(CONTENT, "targets"), METADATA, r"tensors missing: targets"),
        (CONTENT | {"targets": torch.zeros(4, 2)}, METADATA, r"observations: 3 rows, but targets has 4"),
        (CONTENT | {"targets": torch.zeros(3)}, METADATA, r"targets: shape \[3\], expected \[n, d\]"),
        (CONTENT | {"observations": torch.zeros(0, 4)}, METADATA, r"observations: shape \[0, 4\]"),
        (CONTENT | {"observation_mean": torch.zeros(5)}, METADATA, r"observation_mean: shape \[5\], expected \[4\]"),
        (CONTENT | {"learning_rate": torch.ones(1)}, METADATA, r"learning_rate: shape \[1\], expected \[\]"),
        (CONTENT | {"learning_rate": torch.tensor(-1.0)}, METADATA, r"learning_rate: .*-1.0, must be positive"),
        (CONTENT | {"observation_std": torch.zeros(4)}, METADATA, r"observation_std: .*0.0, must be positive"),
        (CONTENT | {"newton_ridge": torch.tensor(-0.1)}, METADATA, r"newton_ridge: .*must be positive"),
        (CONTENT | {"line_search_scale": torch.ones(2)}, METADATA, r"line_search_scale: shape \[2\], expected \[\]"),
        (CONTENT | {"observations": NAN.expand(3, 4).clone()}, METADATA, r"observations: holds NaN or infinity"),
        (CONTENT | {"targets": torch.zeros(3, 2).double()}, METADATA, r"targets: dtype torch.float64"),
        (CONTENT | {"targets": torch.zeros(3, 2).int()}, METADATA, r"targets: dtype torch.int32"),
    ],
)
def test_wrong_content_is_refused_by_name(tmp_path, tensors, metadata, match):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata)
    assert_refused(path, match)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("env_kwargs", "[]"),
        ("env_kwargs", "{"),
        ("learners", '"MLP"'),
        ("learners", "9" * 5000),
        ("versions", "[" * 100_000 + "]" * 100_000),
        ("versions", '{"a":' * 5000 + "1" + "}" * 5000),
        ("returns", "{" + ",".join(f'"{i}":{{}}' for i in range(200_000)) + "}"),
        ("returns", '{"mlp": 3}'),
        ("returns", '{"mlp": {"sampled": {"mean": "high"}}}'),
        ("returns", '{"mlp": {"loud": {"mean": 1, "ci95": 0, "learners": 1, "episodes": 1}}}'),
        ("returns", '{"mlp": {"greedy": {"mean": 1' + "0" * 400 + ', "ci95": 0, "learners": 1, "episodes": 1}}}'),
        ("returns", '{"mlp": {"greedy": {"mean": NaN, "ci95": 0, "learners": 1, "episodes": 1}}}'),
        ("env", "CartPole-v1\x1b[2J"),
        ("\x1b[2J\nformat", "1"),
    ],
)
def test_hostile_metadata_is_refused_or_harmless(tmp_path, key, text):
    path = tmp_path / "a.safetensors"
    save_file(CONTENT, path, METADATA | {key: text})
    if key.endswith("format"):
        assert all(name.isprintable() for name in load(path).metadata)
    else:
        assert_refused(path, key if len(text) < 10_000 else "metadata")


def test_metadata_of_other_types_than_text_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {"__metadata__": METADATA | {"seed": 3}}
    header["targets"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert_refused(path, "not a readable safetensors file")


def test_what_is_shown_holds_no_terminal_escapes(tmp_path):
    escape = "\x1b]0;owned\x07\n\x9b2J"
    path = tmp_path / "a.safetensors"
    returns = {escape: {"greedy": {"mean": 1.0, "ci95": 0.0, "learners": 1, "episodes": 1}}}
    hostile = {key: escape for key in ("license", "created", "step_rule", "config", "unknown")}
    save_file(CONTENT, path, METADATA | hostile | {"returns": json.dumps(returns), "license": escape * 1000})
    dataset = load(path)
    lines = repr(dataset).split("\n")
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) <= 160
    assert "\\x1b]0;owned" in repr(dataset)
    assert not set("\x1b\x07\x9b") & set(json.dumps(dataset.metadata, ensure_ascii=False))
    save_file(CONTENT | {escape: torch.zeros(1)}, path, METADATA)
    assert_refused(path, "unknown meaning")


def test_numbers_without_a_value_are_saved_as_none(tmp_path):
    returns = {"mlp": {"greedy": {"mean": 1.0, "ci95": float("inf"), "learners": 1, "episodes": 1}}}
    path = make_dataset(metadata={"returns": returns}).save(tmp_path / "a.safetensors")
    loaded = load(path)
    assert loaded.metadata["returns"]["mlp"]["greedy"]["ci95"] is None
    assert "return 1.0 (mlp" in repr(loaded)


def test_a_range_without_an_end_comes_back(tmp_path):
    kwargs = {"healthy_z_range": [0.5, math.inf], "terminate_when_unhealthy": False}
    dataset = make_dataset(metadata={"env_kwargs": kwargs})
    assert load(dataset.save(tmp_path / "d.safetensors")).env_kwargs == kwargs


@pytest.mark.parametrize("key", ["env_steps", "seed"])
def test_what_is_saved_can_be_read(key):
    with pytest.raises(DatasetError, match=rf"{key}=1000000\.0: expected an integer"):
        make_dataset().with_metadata(**{key: 1e6})


def test_a_field_cannot_be_contradicted_by_metadata():
    with pytest.raises(DatasetError, match="is a field of its own"):
        make_dataset().with_metadata(env="Ant-v5")
