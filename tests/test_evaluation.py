"""The evaluation protocol: whole episodes, fixed seeds, controls, variations, and the numbers reported."""

from __future__ import annotations

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch
from handmade import make_dataset

from lightning_distill import MLP, ConfigError, DistilledDataset, Variation, evaluate, evaluate_all
from lightning_distill.callbacks.held_out import HeldOutLearners
from lightning_distill.envs import EnvSpec, env_spec, stream_seed
from lightning_distill.envs.vector import EnvPoolSimulator, GymnasiumSimulator, ProcessSimulator
from lightning_distill.evaluation import TEST_SEED, VALIDATION_SEED, Evaluator, RandomActions, shuffle_targets
from lightning_distill.matching import trained_family
from lightning_distill.returns import IN_DISTRIBUTION, RANDOM, SHUFFLED, UNTAUGHT, Evaluation, as_returns

# --- an environment whose returns are known --------------------------------------------------------------------------
from lightning_distill.teaching import seeded


class Signs(gymnasium.Env):
    """Shows ±1 in turn; action 0 is right at −1, action 1 at +1, each right one earns 1.

    The first episode after seeding lasts 1 + seed % 5 steps. Any later one earns −1000 a step, so that a single step of
    it in a return would show.
    """

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    ends = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.later = 0, seed is None
        if seed is not None:
            self.length = 1 + seed % 5
        return self._observe(), {}

    def _observe(self):
        return np.array([1.0 if self.steps % 2 else -1.0], dtype=np.float32)

    def step(self, action):
        right = action == self.steps % 2
        self.steps += 1
        return (
            self._observe(),
            -1000.0 if self.later else float(right),
            self.ends and self.steps == self.length,
            False,
            {},
        )


gymnasium.register("Signs-v0", Signs)


def signs_dataset(**changes) -> DistilledDataset:
    """One linear map of the observation solves it: logits (−o, o)."""
    fields = {
        "observations": torch.tensor([[-1.0], [1.0]]),
        "targets": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
        "learning_rate": torch.tensor(1.0),
        "observation_mean": torch.zeros(1),
        "observation_std": torch.ones(1),
        "env": "Signs-v0",
        "action_type": "discrete",
        "metadata": {"learners": [MLP(depth=0).describe()]},
    }
    return DistilledDataset(**fields | changes)


def lengths(learners: int, episodes: int, seed: int = TEST_SEED) -> torch.Tensor:
    """Of the evaluation's episodes, by the seeds of their environments."""
    first = stream_seed(seed, 2, evaluation=True)
    return 1 + torch.arange(first, first + learners * episodes).view(learners, episodes) % 5


def test_returns_are_of_whole_episodes_and_of_nothing_else():
    evaluation = evaluate(signs_dataset(), learners=7, episodes=3, greedy=True)
    assert torch.equal(evaluation.returns, lengths(7, 3).float())
    assert len(evaluation.returns.unique()) == 5, "episodes of different lengths"
    assert evaluation.greedy


class SteppingAll(Evaluator):
    """Steps every environment until the last has finished; those that have go on with episodes that do not count."""

    def _play(self, env, policy, greedy):
        state = env.reset()
        returns, playing = torch.zeros(len(state)), torch.ones(len(state), dtype=torch.bool)
        while playing.any():
            observation = state["observation"].unflatten(0, (self.learners, self.episodes))
            state["action"] = policy(observation, sample=not greedy).flatten(0, 1)
            step, state = env.step_and_maybe_reset(state)
            returns += step["next", "reward"].squeeze(-1) * playing
            playing &= ~step["next", "done"].squeeze(-1)
        return returns.view(self.learners, self.episodes)


@pytest.mark.parametrize(
    ("backend", "simulator"),
    [("gymnasium", GymnasiumSimulator), ("processes", ProcessSimulator), ("envpool", EnvPoolSimulator)],
)
def test_environments_that_have_finished_are_left_alone_and_returns_are_the_same(backend, simulator, monkeypatch):
    if backend == "envpool":
        pytest.importorskip("envpool")

    def here(makers, context, **options):
        """Processes take seconds to start; Gymnasium steps and resets them as it does environments of this one."""
        return gymnasium.vector.SyncVectorEnv(makers, **options)

    monkeypatch.setattr("gymnasium.vector.AsyncVectorEnv", here)
    asked, step = [], simulator.step
    monkeypatch.setattr(
        simulator, "step", lambda self, action, mask=None: asked.append(mask) or step(self, action, mask)
    )

    def returns(kind):
        evaluator = kind(env_spec("CartPole-v1"), learners=4, episodes=2, backend=backend)
        found = evaluator(make_dataset("CartPole-v1"), MLP(), taught=False).returns
        evaluator.close()
        return found

    every = returns(SteppingAll)
    assert every.unique().numel() > 3
    asked.clear()
    assert torch.equal(returns(Evaluator), every)
    # A cart-pole earns 1 for each step.
    assert sum(mask.sum() for mask in asked) == every.sum()


def test_controls_differ_from_taught_learners():
    table = evaluate_all(signs_dataset(), learners=40, episodes=5)
    assert list(table) == [IN_DISTRIBUTION, UNTAUGHT, SHUFFLED, RANDOM]
    assert list(table[RANDOM]) == ["sampled"]
    assert list(evaluate_all(signs_dataset(), kinds=("greedy",), learners=2)[RANDOM]) == ["sampled"]
    assert all(list(row) == ["sampled", "greedy"] for name, row in table.items() if name != RANDOM)
    greedy = {name: row["greedy"] for name, row in table.items() if name != RANDOM}
    assert torch.equal(greedy[IN_DISTRIBUTION].returns, lengths(40, 5).float())
    assert (greedy[SHUFFLED].returns == 0).all()
    # Untaught and linear without a bias: each learner is right always, never, or in one of the two states.
    assert greedy[UNTAUGHT].share(greedy[IN_DISTRIBUTION]) == pytest.approx(0.5, abs=0.25)
    assert (greedy[UNTAUGHT].returns <= lengths(40, 5)).all()
    # Sampled: taught learners are right with probability σ(2), shuffled ones with σ(−2), untaught and random ones with one half.
    steps = lengths(40, 5).sum().item()
    share = {name: row["sampled"].returns.sum().item() / steps for name, row in table.items()}
    for name, logit in ((IN_DISTRIBUTION, 2.0), (UNTAUGHT, 0.0), (SHUFFLED, -2.0), (RANDOM, 0.0)):
        assert share[name] == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.06), name


def test_families_stand_beside_controls_and_controls_can_be_left_out():
    families = {"linear": MLP(depth=0), "tanh": MLP(width=8, depth=1)}
    table = evaluate_all(signs_dataset(), families, controls=False, kinds=("greedy",), learners=3)
    assert {name: list(row) for name, row in table.items()} == {"linear": ["greedy"], "tanh": ["greedy"]}
    returns = as_returns(table)
    assert returns["linear"]["greedy"].items() >= {"mean": table["linear"]["greedy"].mean, "learners": 3}.items()
    signs_dataset().with_metadata(returns=returns)  # what it says is what a dataset may hold
    one_pair = signs_dataset(observations=torch.ones(1, 1), targets=torch.ones(1, 2))
    assert SHUFFLED not in evaluate_all(one_pair, learners=2)


def test_random_actions_are_uniform_within_bounds_and_normal_without():
    spec = EnvSpec("Some-v0", (3,), "continuous", 2, (-1.0, -math.inf), (3.0, math.inf))
    torch.manual_seed(0)
    bounded, free = RandomActions(spec)(torch.zeros(100, 100, 3)).flatten(0, 1).unbind(-1)
    assert bounded.min() >= -1
    assert bounded.max() <= 3
    assert bounded.mean() == pytest.approx(1.0, abs=0.05)
    assert bounded.std() == pytest.approx(4 / math.sqrt(12), abs=0.05)
    assert free.mean() == pytest.approx(0.0, abs=0.05)
    assert free.std() == pytest.approx(1.0, abs=0.05)


def test_shuffling_leaves_no_pair_as_it_was():
    for pairs in (2, 3, 16):
        dataset = make_dataset(pairs=pairs)
        for seed in range(5):
            shuffled = shuffle_targets(dataset, seed)
            assert not (shuffled.targets == dataset.targets).all(1).any()
            assert torch.equal(shuffled.targets.sort(0).values, dataset.targets.sort(0).values)
            assert torch.equal(shuffled.observations, dataset.observations)
    with pytest.raises(ConfigError, match="at least 2 pairs"):
        shuffle_targets(make_dataset(pairs=1))


def test_an_evaluation_on_the_cpu_leaves_gpus_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    evaluate(signs_dataset(), learners=2)
    assert not seeds


def test_any_device_has_random_numbers_by_a_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    with seeded(3, "mps"):
        assert torch.initial_seed() == 3
    assert seeds == [3]


def test_seeds_fix_everything_and_leave_the_callers_random_state_alone():
    dataset, options = signs_dataset(), {"learners": 6, "episodes": 4}
    random_state = torch.get_rng_state()
    first = evaluate(dataset, **options)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(77)
    assert torch.equal(evaluate(dataset, **options).returns, first.returns)
    assert not torch.equal(evaluate(dataset, seed=VALIDATION_SEED, **options).returns, first.returns)
    with pytest.raises(ConfigError, match="seed=-1"):
        evaluate(dataset, seed=-1, **options)


def test_an_evaluator_repeats_itself():
    evaluator = Evaluator(env_spec("Signs-v0"), learners=4, episodes=2)
    first, other, again = (evaluator(signs_dataset(), MLP(), seed=seed) for seed in (0, 1, 0))
    evaluator.close()
    assert torch.equal(first.returns, again.returns)
    assert not torch.equal(first.returns, other.returns)


def test_evaluation_seeds_are_none_of_trainings():
    keys = [(seed, rank, steps, 3) for seed in range(20) for rank in range(4) for steps in (0, 10**6)]
    training = [stream_seed(*key) for key in keys]
    evaluation = [stream_seed(seed, stream, evaluation=True) for seed in range(100) for stream in (1, 2)]
    assert max(training) + 100_000 < min(evaluation), "environment i starts from seed + i"
    assert max(evaluation) + 100_000 < 2**31


def test_evaluating_with_gradients_turned_off():
    expected = evaluate(signs_dataset(), learners=2, greedy=True).returns
    with torch.inference_mode():
        assert torch.equal(evaluate(signs_dataset(), learners=2, greedy=True).returns, expected)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_over_learners():
    evaluation = Evaluation(torch.tensor([[0.0, 2.0], [2.0, 2.0], [3.0, 5.0], [7.0, 7.0]]), greedy=True)
    assert evaluation.mean == 3.5
    assert evaluation.worst == 1.0
    assert evaluation.iqm == 3.0
    assert evaluation.std == pytest.approx(math.sqrt((2.5**2 + 1.5**2 + 0.5**2 + 3.5**2) / 3))
    assert evaluation.as_dict().keys() == {
        *("mean", "std", "ci95", "iqm", "worst", "learners", "episodes", "greedy"),
    }


def test_the_confidence_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = [Evaluation(5 + 2 * torch.randn(50, 1, generator=generator), greedy=False) for _ in range(200)]
    half_widths = torch.tensor([sample.ci95 for sample in samples])
    assert half_widths.mean().item() == pytest.approx(1.96 * 2 / math.sqrt(50), rel=0.05)
    covered = sum(low <= 5 <= high for low, high in (sample.interval for sample in samples)) / len(samples)
    assert 0.9 <= covered <= 0.98
    assert Evaluation(torch.ones(1, 9), greedy=False).ci95 == math.inf
    assert Evaluation(torch.ones(9, 1), greedy=False).ci95 == 0


def test_shares():
    two, four, loss = (Evaluation(torch.full((3, 1), value), greedy=True) for value in (2.0, 4.0, -1.0))
    assert two.share(four) == 0.5
    assert loss.share(four) == -0.25
    assert two.share(loss) is None


# --- variations ------------------------------------------------------------------------------------------------------


def test_sticky_actions_repeat_some_actions():
    """Repeating is always wrong here: a step after the first is right with probability 1 − p, or after a wrong one."""
    options = {"learners": 50, "episodes": 20, "greedy": True}
    plain = evaluate(signs_dataset(), **options)
    assert torch.equal(evaluate(signs_dataset(), variation=Variation(), **options).returns, plain.returns)
    sticky = evaluate(signs_dataset(), variation=Variation(sticky_actions=0.25), **options)
    steps = lengths(50, 20)
    expected = sum(1 + sum(_right(0.25, step) for step in range(1, int(n))) for n in steps.flatten())
    assert sticky.returns.sum().item() == pytest.approx(expected, rel=0.03)
    assert sticky.mean < plain.mean


def _right(p: float, step: int) -> float:
    """Probability that the action taken is right: its last fresh choice lies an even number of steps back."""
    back = [p**k * (1 - p if k < step else 1) for k in range(step + 1)]
    return sum(back[::2])


def test_mujoco_models_are_scaled():
    plain = gymnasium.make("HalfCheetah-v5").unwrapped.model
    env = Variation(gravity=0.5, mass=2.0, friction=0.25).apply(gymnasium.make("HalfCheetah-v5"))
    env.reset(seed=0)
    varied = env.unwrapped.model
    np.testing.assert_allclose(varied.opt.gravity, 0.5 * plain.opt.gravity)
    np.testing.assert_allclose(varied.geom_friction, 0.25 * plain.geom_friction)
    for name in ("body_mass", "body_inertia", "body_subtreemass"):
        np.testing.assert_allclose(getattr(varied, name), 2 * getattr(plain, name), err_msg=name)
    # The inverse weights that the constraint solver uses are derived from masses.
    assert (varied.body_invweight0[1:] < plain.body_invweight0[1:]).all()


def test_gravity_topples_a_pendulum_sooner():
    steps = {}
    for gravity in (0.5, 1.0, 2.0):
        env = Variation(gravity=gravity).apply(gymnasium.make("InvertedPendulum-v5"))
        env.reset(seed=0)
        steps[gravity] = 0
        while not env.step(np.zeros(1))[2]:
            steps[gravity] += 1
    assert steps[0.5] > steps[1.0] > steps[2.0]


def test_variations_reach_the_evaluation():
    dataset, options = make_dataset("InvertedPendulum-v5"), {"learners": 2, "greedy": True}
    plain = evaluate(dataset, backend="gymnasium", **options).returns
    assert torch.equal(evaluate(dataset, backend="gymnasium", variation=Variation(), **options).returns, plain)
    varied = evaluate(dataset, variation=Variation(mass=3.0), **options).returns
    assert not torch.equal(varied, plain)
    assert torch.equal(evaluate(dataset, variation=Variation(mass=3.0), **options).returns, varied)


def test_what_ends_no_episode_is_cut_and_said(monkeypatch, caplog):
    monkeypatch.setattr(Signs, "ends", False)
    monkeypatch.setattr("lightning_distill.evaluation.LONGEST_EPISODE", 7)
    assert evaluate(signs_dataset(), learners=3, greedy=True).returns.tolist() == [[7.0]] * 3
    assert "env='Signs-v0': 3 of 3 episodes had not ended after 7 steps" in caplog.text


@pytest.mark.parametrize("what", ["an observation", "a reward"])
def test_numbers_that_are_none_end_an_evaluation(what, monkeypatch):
    """With what gave them: a return of NaN would be written nowhere, and would be the best for ever."""
    step = Signs.step

    def broken(self, action):
        observation, reward, *rest = step(self, action)
        if self.steps == 2 and self.length > 2:
            observation, reward = (observation * np.nan, reward) if what == "an observation" else (observation, np.inf)
        return observation, reward, *rest

    monkeypatch.setattr(Signs, "step", broken)
    with pytest.raises(ConfigError, match=rf"env='Signs-v0' returned {what} that is NaN or infinite .* after 2 steps"):
        evaluate(signs_dataset(), learners=20)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mass": 0.0}, r"variation\.mass=0\.0: allowed are factors"),
        ({"gravity": -1.0}, r"variation\.gravity=-1\.0"),
        ({"friction": math.nan}, r"variation\.friction=nan"),
        ({"sticky_actions": 1.0}, r"variation\.sticky_actions=1\.0: allowed are probabilities"),
    ],
)
def test_impossible_variations_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        Variation(**arguments)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variation": Variation(gravity=2.0)}, r"variation gravity=2: env='Signs-v0' is not simulated by MuJoCo"),
        ({"variation": Variation(sticky_actions=0.1), "backend": "envpool"}, r"backend='envpool' with a variation"),
        ({"learners": 0}, r"learners=0: allowed are integers ≥ 1"),
        ({"learners": 2.5}, r"learners=2\.5: allowed are integers ≥ 1"),
        ({"episodes": 0}, r"episodes=0"),
        ({"threads": -1}, r"threads=-1: allowed are integers ≥ 1"),
        ({"threads": 0}, r"threads=0: allowed are integers ≥ 1"),
        (
            {"env": "CartPole-v1"},
            r"the dataset \(for Signs-v0\) has observations \(1,\).*env='CartPole-v1' needs \(4,\)",
        ),
        ({"env": "Sign-v0"}, r"did you mean Signs-v0"),
    ],
)
def test_what_cannot_be_evaluated(options, match):
    with pytest.raises(ConfigError, match=match):
        evaluate(signs_dataset(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kinds": ("greed",)}, r"kinds=\('greed',\): allowed are lists of one or more of sampled, greedy"),
        ({"kinds": "sampled"}, r"kinds='sampled'"),
        ({"step_rules": []}, r"step_rules=\[\]: allowed are lists of one or more of sgd, line_search"),
        ({"step_rules": "sgd"}, r"step_rules='sgd'"),
    ],
)
def test_what_no_table_can_hold(options, match):
    with pytest.raises(ConfigError, match=match):
        evaluate_all(signs_dataset(), learners=2, **options)


def test_families_of_a_table_may_be_given_by_name():
    assert list(evaluate_all(signs_dataset(), ["relu"], controls=False, kinds=["greedy"], learners=2)) == ["relu"]


def test_the_trained_family_is_built_from_words_alone():
    assert trained_family(make_dataset()).describe() == MLP().describe()
    described = make_dataset(metadata={"learners": [MLP(width=32, activation="relu").describe()]})
    assert trained_family(described).describe() == MLP(width=32, activation="relu").describe()
    for words in (
        [{"class_path": "os.system", "init_args": {"command": "exit"}}],
        [{"class_path": "lightning_distill.MLP", "init_args": {"width": "wide"}}],
        [{"class_path": "lightning_distill.MLP", "init_args": {"breadth": 3}}],
        [3],
        {"class_path": "lightning_distill.MLP"},
    ):
        with pytest.raises(ConfigError, match="the dataset's own cannot be built"):
            trained_family(make_dataset(metadata={"learners": words}))


def test_where_the_own_family_cannot_be_built_another_takes_its_place():
    dataset = signs_dataset(metadata={"learners": [{"class_path": "mine.Net", "init_args": {}}]})
    table = evaluate_all(dataset, {"paper": "paper"}, controls=False, step_rules=["line_search"], learners=3)
    assert set(table) == {"paper, line_search step"}


@pytest.mark.parametrize("name", ["control: untaught", "control: shuffled targets"])
def test_a_family_has_a_name_of_its_own(name):
    with pytest.raises(ConfigError, match=f"{name}: the name of a control"):
        evaluate_all(signs_dataset(), {name: "paper"}, controls=True, learners=3)
    for row in (name, "in-distribution", "trained policy"):
        with pytest.raises(ConfigError, match=rf"held_out\.families: '{row}' is the name of another row"):
            HeldOutLearners({row: "relu"})


def test_variations_of_an_environment_that_a_module_registers():
    dataset = dataclasses.replace(make_dataset("CartPole-v1"), env="gymnasium.envs:CartPole-v1")
    assert evaluate(dataset, variation=Variation(sticky_actions=0.1), learners=2).mean > 1


def test_another_environment_is_made_without_the_arguments_of_the_own():
    short = signs_dataset(metadata={"env_kwargs": {"wings": 2}}, env="Winged-v0")
    assert evaluate(short, env="Signs-v0", learners=3).mean > 0
    with pytest.raises(ConfigError, match="wings"):
        evaluate(short, env="Signs-v0", learners=3, env_kwargs={"wings": 2})
    with pytest.raises(ConfigError, match="wings"):
        evaluate(signs_dataset(metadata={"env_kwargs": {"wings": 2}}), env="Signs-v0", learners=3)
