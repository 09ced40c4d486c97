"""Atari: what training and evaluation see of a game, encoder levels, and files with an encoder in use."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_meta_ppo import Changes, small_run
from torch import nn

from lightning_distill import ConfigError, MetaPPO, NatureCNN, Variation, evaluate, load, teach, teach_many, watching
from lightning_distill.envs import EnvSpec, env_spec, make_env
from lightning_distill.envs.atari import AtariSimulator
from lightning_distill.families import family_named
from lightning_distill.imitation import Imitation
from lightning_distill.importing import import_released
from lightning_distill.matching import trained_family
from lightning_distill.nature import encoder_from, make_encoder, make_nature_critic, scaled
from lightning_distill.optimizing import clipped_step
from lightning_distill.pictures import _action_names, draw_pairs
from lightning_distill.step_rules import STEP_RULES
from lightning_distill.teaching import with_line_search

SPEC = EnvSpec("ALE/Pong-v5", (4, 84, 84), "discrete", 6, observation_dtype="uint8")
SHAPES = [(4, 84, 84), (32, 20, 20), (64, 9, 9), (64, 7, 7), (512,)]
#: Games that end soon.
SHORT = {"max_num_frames_per_episode": 60}


def simulator(env, training, num_envs=3, seed=5, **kwargs):
    return AtariSimulator(env_spec(env, kwargs), num_envs, seed, 1, training)


# --- the environment -------------------------------------------------------------------------------------------------


def test_spec_says_all_options():
    spec = env_spec("ALE/MsPacman-v5", {"repeat_action_probability": 0.25})
    assert (spec.observation_shape, spec.action_type, spec.actions, spec.frames) == ((4, 84, 84), "discrete", 9, True)
    assert spec.kwargs == {
        "repeat_action_probability": 0.25,
        "reward_clipping": True,
        "full_action_space": False,
        "max_num_frames_per_episode": 108_000,
    }
    assert EnvSpec(**spec.as_dict()) == spec


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"frameskip": 2}, "frameskip for ALE/Pong-v5; allowed are repeat_action_probability"),
        ({"repeat_action_probability": 1.0}, r"repeat_action_probability=1.0: allowed are probabilities"),
        ({"repeat_action_probability": "x"}, r"repeat_action_probability='x': allowed are probabilities"),
        ({"reward_clipping": 1}, "reward_clipping=1: allowed are true and false"),
        ({"full_action_space": "all"}, "full_action_space='all': allowed are true and false"),
        ({"max_num_frames_per_episode": 0}, "max_num_frames_per_episode=0: allowed"),
        ({"max_num_frames_per_episode": None}, "max_num_frames_per_episode=None: allowed"),
    ],
)
def test_options_that_cannot_work_are_named(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        env_spec("ALE/Pong-v5", kwargs)


def test_only_the_native_simulator_plays_atari():
    with pytest.raises(ConfigError, match=r"data.backend='envpool' for ALE/Pong-v5: allowed is auto"):
        make_env(env_spec("ALE/Pong-v5"), 2, 0, backend="envpool")


def test_training_alone_ends_episodes_with_a_life_and_clips_rewards():
    """Both play the same games: a lost life changes what counts as an episode, not what is played."""
    training, whole = simulator("ALE/SpaceInvaders-v5", True), simulator("ALE/SpaceInvaders-v5", False)
    rng = np.random.default_rng(0)
    assert np.array_equal(training.reset(None), whole.reset(None))
    lives_lost, over, raw = 0, np.zeros(3, dtype=bool), set()
    while not over.any():
        action = rng.integers(6, size=3)
        seen, clipped, ended, _ = training.step(action)
        also_seen, reward, over, _ = whole.step(action)
        assert np.array_equal(seen, also_seen)
        assert np.array_equal(clipped, np.sign(reward))
        assert (ended | ~over).all()
        lives_lost += int(ended.sum())
        raw |= set(reward.tolist())
        if ended.any():
            before = seen.copy()
            after = training.reset(ended)
            assert np.array_equal(after[~over], before[~over]), "the game goes on after a lost life"
    assert max(raw) > 1
    assert lives_lost >= 3, "a game has three lives"


def test_rewards_count_as_they_are_by_option():
    """A mushroom, a segment and a spider are not worth the same."""
    raw = simulator("ALE/Centipede-v5", True, reward_clipping=False)
    whole = simulator("ALE/Centipede-v5", False)
    rng = np.random.default_rng(0)
    for game in (raw, whole):
        game.reset(None)
    seen = set()
    for _ in range(300):
        action = rng.integers(18, size=3)
        reward = raw.step(action)[1]
        assert np.array_equal(reward, whole.step(action)[1])
        seen |= set(reward.tolist())
    assert max(seen) > 1


def test_terminal_frames_are_kept_and_a_time_limit_is_no_end():
    env = make_env(env_spec("ALE/Breakout-v5", SHORT), 3, seed=1)
    state = env.reset()
    assert state["observation"].dtype == torch.uint8
    for _ in range(20):
        state["action"] = torch.randint(4, (3,))
        step, state = env.step_and_maybe_reset(state)
        done = step["next", "done"].squeeze(-1)
        same = (step["next", "observation"] == state["observation"]).flatten(1).all(1)
        assert torch.equal(same, ~done), "a new game begins exactly where one has ended"
        if done.any():
            assert (step["next", "truncated"] == step["next", "done"]).all()
            assert not step["next", "terminated"].any()
            break
    assert done.any()
    env.close()


def test_starts_differ_and_follow_from_the_seed():
    first, again = (simulator("ALE/Pong-v5", False, num_envs=8, seed=3) for _ in range(2))
    _, info = first.envs.reset(seed=3)
    assert len(set(info["episode_frame_number"].tolist())) > 2
    assert np.array_equal(first.reset(None), again.reset(None))


def test_sticky_actions_by_option_and_by_variation():
    seen = []
    for sticky in (0.0, 0.9):
        game = simulator("ALE/Pong-v5", False, repeat_action_probability=sticky)
        game.reset(None)
        for step in range(30):
            game.step(np.full(3, 2 + step % 2))  # to and fro
        seen.append(game.observation)
    assert not np.array_equal(*seen)
    dataset = module(4).distilled()
    with pytest.raises(ConfigError, match="an Atari game; allowed: sticky_actions"):
        evaluate(dataset, learners=2, env_kwargs=SHORT, variation=Variation(gravity=2.0))
    assert (
        evaluate(dataset, learners=2, env_kwargs=SHORT, variation=Variation(sticky_actions=0.5))
        .returns.isfinite()
        .all()
    )


# --- the network -----------------------------------------------------------------------------------------------------


def whole_network(outputs=6):
    """The Nature CNN as everybody writes it."""
    convolutions = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3)]
    return nn.Sequential(
        *convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, outputs)
    )


@pytest.mark.parametrize("level", range(5))
def test_encoder_and_learner_are_the_whole_network_cut_in_two(level):
    torch.manual_seed(level)
    networks = [whole_network() for _ in range(2)]
    states = [network.state_dict() for network in networks]
    encoder = make_encoder(level)
    encoded = encoder.state_dict()
    assert len(encoded) == 2 * level
    for network in networks:
        network.load_state_dict(network.state_dict() | encoded)
    family = NatureCNN()
    params = family.draw(2, SHAPES[level], 6)
    assert set(params) | set(encoded) == set(states[0])
    for name in params:
        assert params[name].shape == (2, *states[0][name].shape)
        params[name] = torch.stack([state[name] for state in states])
    frames = torch.rand(2, 3, 4, 84, 84)
    features = encoder(frames)
    assert features.shape == (2, 3, *SHAPES[level])
    with torch.no_grad():
        expected = torch.stack([network(x) for network, x in zip(networks, frames, strict=True)])
        torch.testing.assert_close(family.forward(params, features), expected, rtol=1e-4, atol=1e-5)
        assert make_nature_critic(SHAPES[level])(features).shape == (2, 3, 1)


@pytest.mark.parametrize("name", ["nature_256", "nature_tanh", "nature_default_init", "nature_xavier", "residual_cnn"])
def test_held_out_families_take_frames(name):
    family = family_named(name)
    params = family.draw(2, (4, 84, 84), 6)
    assert family.forward(params, torch.rand(2, 3, 4, 84, 84)).shape == (2, 3, 6)


def test_shapes_no_layer_takes_are_refused():
    with pytest.raises(ValueError, match=r"fed \[3, 64, 64\]; allowed are frames"):
        NatureCNN().draw(1, (3, 64, 64), 6)
    with pytest.raises(ConfigError, match="encoder_level=5"):
        MetaPPO(SPEC, encoder_level=5)
    with pytest.raises(ConfigError, match=r"encoder_level=1 with env='CartPole-v1': allowed are 0"):
        MetaPPO(EnvSpec("CartPole-v1", (4,), "discrete", 2), encoder_level=1)
    with pytest.raises(ConfigError, match="encoded_pairs"):
        MetaPPO(SPEC, encoded_pairs=True)


# --- learning --------------------------------------------------------------------------------------------------------


def module(level, **kwargs):
    torch.manual_seed(level)
    small = NatureCNN(width=8, channels=(2, 3, 2), output_gain=1.0)
    return MetaPPO(SPEC, pairs=2, learners=2, family=small, encoder_level=level, **kwargs)


@pytest.mark.parametrize(("level", "encoded"), [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_meta_gradient_reaches_pairs_and_encoder(level, encoded):
    learning = module(level, encoded_pairs=encoded).double()
    learning.clip = 10.0  # no kinks but those of the activations
    fresh = learning.family.draw(2, learning.learner_shape, 6)
    learning._fresh = {name: value.double() for name, value in fresh.items()}
    frames = torch.rand(2, 3, 4, 84, 84, dtype=torch.float64)
    batch = {
        "action": torch.randint(6, (2, 3)),
        "log_prob": -torch.rand(2, 3).double(),
        "advantage": torch.randn(2, 3).double(),
    }

    def loss():
        return learning._policy_loss(batch | {"input": learning.encoder(frames)})[0]

    loss().backward()
    parameters = dict(learning.actor.named_parameters()) | dict(learning.encoder.named_parameters())
    for name, parameter in parameters.items():
        gradient = parameter.grad
        index = gradient.abs().flatten().argmax().item()
        assert gradient.flatten()[index] != 0, name
        at = tuple(int(i) for i in np.unravel_index(index, gradient.shape)) if gradient.dim() else ()
        kept, values, step = parameter.data[at].item(), [], 1e-6
        for shift in (step, -step):
            parameter.data[at] = kept + shift
            values.append(loss().item())
        parameter.data[at] = kept
        found = (values[0] - values[1]) / (2 * step)
        assert gradient[at].item() == pytest.approx(found, rel=1e-3, abs=1e-9), name


def test_the_encoder_waits_for_the_critic_as_the_actor_does():
    changes = Changes()
    data = {"env_steps": 3 * 8, "num_envs": 2, "rollout_length": 4}
    options = {"pairs": 2, "learners": 2, "family": "nature", "encoder_level": 4, "critic_warmup": 2}
    small_run("ALE/Pong-v5", callbacks=[changes], data=data, **options)
    assert changes.found == [{"critic"}, {"critic"}, {"critic", "actor", "encoder"}]


def test_the_encoder_stops_at_the_target_kl_as_the_actor_does(monkeypatch):
    """The policies see through it: trained on by the critic's loss it would move them out of sight."""
    seen = []

    def watch(optimizer, params, max_norm):
        norm = clipped_step(optimizer, params, max_norm)
        seen.append([param.detach().clone() for param in params])
        return norm

    monkeypatch.setattr("lightning_distill.rollout_module.clipped_step", watch)
    data = {"env_steps": 8, "num_envs": 2, "rollout_length": 4}
    options = {"pairs": 2, "learners": 2, "family": "nature", "encoder_level": 4, "target_kl": 1e-12}
    small_run("ALE/Pong-v5", data=data, epochs=2, minibatches=2, **options)
    critics = [seen[0], *seen[2:]]  # the actor's one step is the second
    assert len(critics) == 4
    trained = [[not torch.equal(*pair) for pair in zip(*steps, strict=True)] for steps in itertools.pairwise(critics)]
    encoder = 8  # weights and biases of three convolutions and a layer, behind the critic's own
    assert all(step == [True] * (len(step) - encoder) + [False] * encoder for step in trained), trained


def test_a_run_starts_from_a_dataset_of_a_higher_encoder_level(tmp_path):
    path = str(module(4).distilled().save(tmp_path / "d.safetensors"))
    begun = module(2, start=path)
    encoder = load(path).encoder
    assert set(begun.encoder.state_dict()) == {name for name in encoder if name[0] in "02"}
    for name, tensor in begun.encoder.state_dict().items():
        assert torch.equal(tensor, encoder[name]), name
    assert torch.equal(begun.distilled().observations, load(path).observations)
    # Other learners: a step as long as before, compared with the best one, is another η.
    scales = [with_line_search(made, module(2).family).line_search_scale for made in (load(path), begun.distilled())]
    torch.testing.assert_close(*scales)
    with pytest.raises(ConfigError, match=r"model.start=.*encoder level 4: allowed are levels up to the dataset's 2"):
        module(4, start=str(begun.distilled().save(tmp_path / "low.safetensors")))


def test_imitation_begins_with_frames_and_trains_no_critic(tmp_path):
    expert = str(module(4).distilled().save(tmp_path / "d.safetensors"))
    small = NatureCNN(width=8, channels=(2, 3, 2))
    learning = Imitation(SPEC, expert=expert, pairs=2, learners=2, family=small, encoder_level=1)
    frames = torch.randint(256, (5, *SPEC.observation_shape), dtype=torch.uint8)
    learning._begin_with(frames[:2])
    for pair in learning.synthetic_batch.observations:
        assert any(torch.allclose(pair, frame / 255) for frame in frames)
    assert learning.critic is None
    assert {id(p) for p in learning.critic_params()} == {id(p) for p in learning.encoder.parameters()}


def test_learners_without_an_encoder_imitate_from_frames_less_their_mean(tmp_path, monkeypatch):
    """In the run, by its file, by what a checkpoint holds, and where another run begins with the file."""
    monkeypatch.setattr("lightning_distill.imitation.STEPS", 10)
    expert = str(module(4).distilled().save(tmp_path / "expert.safetensors"))
    seen = []

    class Watched(Imitation):
        def _episodes(self):
            seen.append(super()._episodes())
            return seen[0]

    data = {"env_steps": 160 + 8, "num_envs": 2, "rollout_length": 4}
    small = {"pairs": 2, "learners": 2, "family": NatureCNN(width=8, channels=(2, 3, 2))}
    run = small_run("ALE/Pong-v5", Watched, iterations=1, data=data, expert=expert, **small)
    frames = seen[0]["observation"]
    mean = frames.float().mean(0)
    assert mean.std() > 1
    dataset = load(run.distilled().save(tmp_path / "d.safetensors"))
    torch.testing.assert_close(dataset.observation_mean, mean)
    torch.testing.assert_close(run.encode(frames), (frames - mean) / 255)
    torch.testing.assert_close(dataset.normalise(frames), run.encode(frames))
    restored, begun = (
        Imitation(SPEC, expert=expert, **small),
        MetaPPO(SPEC, start=str(tmp_path / "d.safetensors"), **small),
    )
    restored.load_state_dict(run.state_dict())
    for other in (restored, begun):
        torch.testing.assert_close(other.encode(frames), run.encode(frames))
    # Encoders are fed frames as they are, and the file says so, whatever the expert is fed.
    encoded = Imitation(SPEC, expert=str(tmp_path / "d.safetensors"), encoder_level=1, **small)
    assert not encoded.distilled().observation_mean.any()


# --- files in use ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "encoded"), [(0, False), (2, False), (2, True), (4, True)])
def test_an_exported_file_teaches_and_acts(level, encoded, tmp_path):
    dataset = load(module(level, encoded_pairs=encoded).distilled().save(tmp_path / "d.safetensors"))
    assert (dataset.encoder_level, dataset.observation_shape) == (level, (4, 84, 84))
    assert dataset.learner_shape == SHAPES[level]
    head = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPES[level]), 6))
    frames = np.random.default_rng(0).integers(256, size=(5, 4, 84, 84), dtype=np.uint8)
    # By hand: normalise, encode, one step on the mean squared error.
    encoder = nn.Identity() if level == 0 else make_encoder(level)
    encoder.load_state_dict(dict(dataset.encoder))
    with torch.no_grad():
        pairs = dataset.observations if encoded else encoder(dataset.observations)
        features = encoder(torch.from_numpy(frames) / 255)
    output = head(pairs)
    gradients = torch.autograd.grad((output - dataset.targets).square().mean(), list(head.parameters()))
    step = [p - dataset.learning_rate * g for p, g in zip(head.parameters(), gradients, strict=True)]
    expected = features.flatten(1) @ step[0].T + step[1]
    state = torch.get_rng_state()
    policy = teach(head, dataset)
    assert torch.equal(torch.get_rng_state(), state), "an encoder is made without drawing"
    assert np.array_equal(policy(frames), expected.argmax(1).numpy())
    assert policy(frames[0]) == expected[0].argmax()
    stacked = teach_many([head, head], dataset)
    assert np.array_equal(stacked(np.stack([frames, frames])), np.stack([expected.argmax(1).numpy()] * 2))


def test_the_export_keeps_the_family_and_draws_the_pairs(tmp_path):
    dataset = module(2).distilled()
    assert trained_family(dataset).describe() == module(2).family.describe()
    for name, made in (("frames", dataset), ("features", module(2, encoded_pairs=True).distilled())):
        with Image.open(draw_pairs(made, tmp_path / f"{name}.png")) as picture:
            assert picture.width > 1000


@pytest.mark.parametrize(("full", "names"), [(False, "NOOP FIRE RIGHT LEFT"), (True, "NOOP FIRE UP RIGHT LEFT")])
def test_pictures_name_actions_as_the_game_does(full, names):
    spec = env_spec("ALE/Breakout-v5", {"full_action_space": full, "reward_clipping": False})
    dataset = MetaPPO(spec, pairs=2, learners=1, family="nature", encoder_level=4).distilled()
    assert _action_names(dataset)[: len(names.split())] == names.split()


def test_encoders_that_are_none_are_refused():
    good = make_encoder(2).state_dict()
    with pytest.raises(ValueError, match=r"encoder of level 2: holds .*; expected weight and bias"):
        encoder_from({name.replace("2.", "3."): value for name, value in good.items()})
    with pytest.raises(ValueError, match="encoder of level 2: not one of the Nature CNN"):
        encoder_from(good | {"2.weight": torch.zeros(64, 32, 5, 5)})
    with pytest.raises(ValueError, match="encoder of level 1: not one of the Nature CNN"):
        encoder_from({"0.weight": torch.zeros(3), "0.bias": torch.zeros(3)})


@pytest.mark.parametrize("level", [0, 2])
def test_imported_files_play_by_our_protocol(level, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pairs = {"x": torch.randn(10, 4, 84, 84, generator=generator), "y": torch.randn(10, 18, generator=generator)}
    torch.save(pairs | {"inner_lr": torch.tensor(0.3)}, tmp_path / "d.pt")
    torch.save(make_encoder(2).state_dict(), tmp_path / "e.pt")
    encoder = tmp_path / "e.pt" if level else None
    dataset = import_released(tmp_path / "d.pt", "ALE/Centipede-v5", encoder)
    evaluation = evaluate(dataset, learners=2, env_kwargs={"max_num_frames_per_episode": 200})
    assert evaluation.returns.shape == (2, 1)
    assert evaluation.returns.isfinite().all()


def test_evaluation_does_not_depend_on_the_precision_of_training():
    dataset, options = module(4).distilled(), {"learners": 3, "env_kwargs": {"max_num_frames_per_episode": 400}}
    expected = evaluate(dataset, **options).returns
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evaluate(dataset, **options).returns, expected)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("rule", STEP_RULES)
def test_every_step_rule_works_in_mixed_precision(rule, level):
    """In bfloat16 learners end near where single precision puts them, and the gradient still reaches the pairs."""
    learning = module(level, step_rule=rule)
    learning.draw()
    frames = torch.rand(2, 3, 4, 84, 84)

    def outputs(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return learning.family.forward(learning.policy_params(), learning.encoder(frames)).float()

    exact, rounded = outputs(False).detach(), outputs(True)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    rounded.square().sum().backward()
    assert learning.synthetic_batch.observations.grad.abs().sum() > 0


# --- seeing ----------------------------------------------------------------------------------------------------------


def test_a_taught_learner_is_filmed(tmp_path):
    played = watching.record(module(4).distilled(), tmp_path / "pong.gif", steps=5)
    assert played.steps == 5
    with Image.open(played.path) as video:
        assert (video.n_frames, video.size) == (6, (320, 420))


def test_a_window_needs_a_display(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ConfigError, match=r"no display to open a window on; -o NAME.gif"):
        watching.record(module(4).distilled(), None, steps=2)


def test_a_window_shows_every_step(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("DISPLAY", ":0")
    shown = []
    monkeypatch.setattr(pygame.display, "flip", lambda: shown.append(1))
    played = watching.record(module(4).distilled(), None, steps=3)
    assert (played.path, played.steps) == (None, 3)
    assert len(shown) >= 4  # the start and each step


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_frames_are_scaled_in_a_copy(dtype):
    frames = torch.full((2, 4, 84, 84), 255, dtype=dtype).contiguous(memory_format=torch.channels_last)
    assert scaled(frames).unique().tolist() == [1.0]
    assert frames.unique().tolist() == [255]
