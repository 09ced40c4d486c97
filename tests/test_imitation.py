"""Imitation: a dataset distilled into another one for other learners."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
import yaml
from test_meta_ppo import small_run
from test_teaching import RandomFeatures
from torch import nn
from torch.distributions import Categorical, Normal
from torch.distributions import kl_divergence as torchs

from lightning_distill import MLP, PPO, ConfigError, MetaPPO, evaluate, load, teach_many
from lightning_distill.cli import main
from lightning_distill.envs import env_spec
from lightning_distill.experts import TAUGHT, Expert, expert_from
from lightning_distill.imitation import Imitation, clip_means, kl_divergence


def other_learners(iterations, model=Imitation, **options):
    return small_run(
        model=model,
        **{"expert": "cartpole_1d_plain", **options},
        pairs=6,
        step_rule="newton",
        family=MLP(width=32, activation="relu"),
        learners=4,
        iterations=iterations,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        data={"num_envs": 32, "env_steps": 16 * 1000 + 640 * iterations},
    )


class Untrained(Imitation):
    def training_step(self, rollout, batch_idx):
        """Leaves everything as it was in the beginning."""


def test_other_learners_learn_what_the_expert_does():
    trained, untrained = other_learners(25), other_learners(1, Untrained)
    assert trained.distilled().step_rule == "newton"
    mean = [evaluate(module.distilled(), learners=50, greedy=True).mean for module in (trained, untrained)]
    assert mean[0] > 1.5 * mean[1] > 30  # untaught learners reach 10
    logged = trained.trainer.callback_metrics
    assert logged["loss/policy"] > 0
    assert logged["time/inference"] > 0
    assert not {"loss/value", "loss/explained_variance", "policy/kl"} & set(logged), (
        "nothing here has a critic or a clip"
    )


def test_pairs_begin_as_states_of_the_expert_with_its_outputs():
    module = other_learners(1)
    start = other_learners(1)
    assert torch.equal(module.synthetic_batch.targets, start.synthetic_batch.targets), "the same seed, the same pairs"
    assert module.env_steps == 16 * 1000 + 640, "the run's, with those in which the expert was seen first"
    assert module.iteration == 1
    module = other_learners(1, Untrained)
    batch, moments = module.synthetic_batch, module.observation_moments
    states = batch.observations * moments.std + moments.mean
    torch.testing.assert_close(module._expert.output(states.float()), batch.targets, atol=1e-3, rtol=1e-3)
    expert = load("cartpole_1d_plain")
    torch.testing.assert_close(module.distilled().observation_std, expert.observation_std, atol=1e-6, rtol=1e-5)


def test_each_process_sees_the_expert_in_episodes_of_its_own():
    class Seen(Imitation):
        def on_train_start(self):
            self.seen = []
            for self.rank in (0, 1, 0):
                self.seen.append(self._episodes()["observation"])

    zero, one, again = other_learners(1, Seen).seen
    assert torch.equal(zero, again)
    assert not torch.equal(zero, one)


def test_the_experts_noise_is_kept_however_small():
    dataset = load("inverted_double_pendulum")
    module = Imitation(env_spec(dataset.env), expert="inverted_double_pendulum", pairs=8, log_std_min=-1.0)
    module._begin_with(torch.randn(8, *dataset.observation_shape))
    torch.testing.assert_close(module.log_std, dataset.log_std)
    started = {"start": "inverted_double_pendulum", "pairs": 64}
    module = Imitation(env_spec(dataset.env), expert="inverted_double_pendulum", **started)
    torch.testing.assert_close(module.log_std, dataset.log_std)
    module = MetaPPO(env_spec(dataset.env), log_std_min=-1.0, **started)  # by reward it has to explore
    torch.testing.assert_close(module.log_std, torch.tensor([-1.0]))


def test_the_expert_is_the_mean_of_learners_taught_on_its_dataset():
    random_state = torch.get_rng_state()
    module = Imitation(spec_of("cartpole_1d"), expert="cartpole_1d_plain", pairs=3)
    assert not torch.equal(torch.get_rng_state(), random_state), "the batch is drawn"
    observations = torch.randn(5, 4) * 0.1
    torch.manual_seed(0)
    dataset = load("cartpole_1d_plain")
    policy = teach_many(MLP(), dataset, TAUGHT)
    outputs = policy.module(dataset.normalise(observations).expand(TAUGHT, 5, 4))
    torch.testing.assert_close(module._expert.output(observations), outputs.mean(0))
    assert not [name for name in module.state_dict() if "expert" in name]


def test_gradient_of_the_divergence_reaches_the_batch_alone():
    for name, expert in (("cartpole_1d", "cartpole_1d_plain"), ("inverted_pendulum", "inverted_pendulum")):
        module = Imitation(spec_of(name), expert=expert, pairs=3, learners=2, step_rule="projection")
        module.draw()
        module._normaliser = module.observation_moments.mean.float(), module.observation_moments.std.float()
        output = torch.randn(2, 6, module.spec.actions)
        critic_loss, loss, found = module.losses({"observation": torch.randn(2, 6, 4), "expert": output}, True)
        assert critic_loss is None
        assert torch.equal(loss, found["loss/policy"])
        loss.backward()
        touched = {key for key, parameter in module.named_parameters() if parameter.grad is not None}
        assert touched == {key for key, _ in module.named_parameters() if key.startswith("actor.")}
        assert all(module.actor.get_parameter(key).grad.any() for key in ("observations", "targets"))
        assert not any(parameter.grad.any() for parameter in module.actor.noise.parameters()), "the expert's is kept"
        assert found["policy/entropy"].isfinite()


def test_divergences_are_those_of_torch():
    expert, output, log_std = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.randn(2)
    categorical = [Categorical(logits=logits) for logits in (expert, output)]
    torch.testing.assert_close(kl_divergence(expert, output, None), torchs(*categorical))
    normal = [Normal(mean, log_std.exp()) for mean in (expert, output)]
    torch.testing.assert_close(kl_divergence(expert, output, log_std), torchs(*normal).sum(-1))


def test_means_beyond_the_same_bound_are_alike():
    expert = torch.tensor([[3.0, 3.0, 3.0, 0.5, -3.0, -3.0]])
    output = torch.tensor([[9.0, 1.3, -2.0, 4.0, -1.5, 0.0]], requires_grad=True)
    wanted, counted = clip_means(expert, output, torch.full((6,), 0.25), torch.tensor([[-1.0] * 6, [1.0] * 6]))
    torch.testing.assert_close(wanted - counted, torch.tensor([[0.0, 0.2, 3.5, -3.5, 0.0, -1.5]]))
    (wanted - counted).square().sum().backward()
    assert output.grad.ne(0).tolist() == [[False, True, True, True, False, True]]
    free, same = clip_means(expert, output, torch.ones(6), torch.tensor([[-math.inf] * 6, [math.inf] * 6]))
    assert free.equal(expert)
    assert same.equal(output)


def test_an_expert_of_another_environment_is_refused():
    with pytest.raises(ConfigError, match=r"the dataset \(for CartPole-v1\).*needs"):
        Imitation(spec_of("halfcheetah"), expert="cartpole_1d_plain")


def spec_of(name):
    from lightning_distill.envs import env_spec

    return env_spec(load(name).env)


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_an_expert_acts_with_more_noise_than_is_imitated(factor):
    """What it would do on average is the label, whatever it does. Noise is of another size in each environment, up to that."""
    module = Imitation(
        env_spec("InvertedDoublePendulum-v5"), expert="inverted_double_pendulum", expert_noise=factor, pairs=8
    )
    torch.manual_seed(0)
    states = [module.act({"observation": torch.zeros(20_000, *module.spec.observation_shape)}) for _ in range(2)]
    expected = module._expert.output(torch.zeros(1, *module.spec.observation_shape))
    noise = []
    for state in states:
        torch.testing.assert_close(state["output"], expected.expand_as(state["output"]))
        noise.append((state["action"] - state["output"]) / (factor * module._expert.log_std.exp()))
    # E u² = 1/3 and E u⁴ = 1/5 of a uniform u, which in a rollout stays the same.
    torch.testing.assert_close(noise[0].square().mean().sqrt().item(), 3**-0.5, rtol=0.03, atol=0)
    torch.testing.assert_close((noise[0] * noise[1]).square().mean().item(), 0.2, rtol=0.1, atol=0)


@pytest.fixture(scope="module")
def policy_checkpoint(tmp_path_factory):
    """A little trained policy of direct PPO, of a family that its checkpoint alone says, and its run's module."""
    path = tmp_path_factory.mktemp("ppo") / "policy.ckpt"
    module = small_run("Pendulum-v1", PPO, iterations=3, final_noise=0.5, family="relu")
    module.trainer.save_checkpoint(path)
    return path, module


def test_a_policy_of_direct_rl_is_an_expert(policy_checkpoint):
    path, trained = policy_checkpoint
    module = Imitation(env_spec("Pendulum-v1"), expert=str(path), pairs=8)
    expert = module._expert
    observations = torch.randn(5, 3)
    moments = trained.observation_moments
    inputs = trained.encode(observations, (moments.mean.float(), moments.std.float()))
    expected = trained.family.forward(trained.policy_params(), inputs.unsqueeze(0))[0]
    torch.testing.assert_close(expert.output(observations), expected)
    torch.testing.assert_close(expert.log_std, trained.log_std)
    torch.testing.assert_close(module.distilled().observation_std, moments.std.float())


def test_the_family_of_an_expert_may_have_been_named_by_another_path(policy_checkpoint, tmp_path):
    path, trained = policy_checkpoint
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["family"] = {"class_path": "lightning_distill.learners.MLP", "init_args": {}}
    torch.save(checkpoint, tmp_path / "same.ckpt")
    module = Imitation(env_spec("Pendulum-v1"), expert=str(tmp_path / "same.ckpt"), pairs=8)
    assert module._expert.module.family.describe() == trained.family.describe()


def test_the_family_of_an_expert_may_be_ones_own_with_arguments(tmp_path):
    path = tmp_path / "own.ckpt"
    trained = small_run("Pendulum-v1", PPO, iterations=1, family=partial(RandomFeatures, width=8))
    trained.trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    named = {"class_path": "test_teaching.RandomFeatures", "init_args": {"width": 8}}
    checkpoint["hyper_parameters"] |= {"family": named, "encoder_level": 0, "log_std_min": -3.0}
    torch.save(checkpoint, path)
    module, observations = Imitation(env_spec("Pendulum-v1"), expert=str(path), pairs=8), torch.randn(5, 3)
    torch.testing.assert_close(module._expert.output(observations), trained.present_output(observations))
    checkpoint["hyper_parameters"]["family"] = named | {"class_path": "no_such_module.Net"}
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match=r"own\.ckpt'.*No module named 'no_such_module'"):
        Imitation(env_spec("Pendulum-v1"), expert=str(path), pairs=8)
    checkpoint["hyper_parameters"]["family"] = {"class_path": "os.system", "init_args": {"command": "exit"}}
    torch.save(checkpoint, path)
    with pytest.raises(ConfigError, match=r"family='os\.system': with arguments allowed are classes of nn\.Module"):
        Imitation(env_spec("Pendulum-v1"), expert=str(path), pairs=8)


def test_what_is_no_expert_is_named(policy_checkpoint, tmp_path):
    path, _ = policy_checkpoint
    with pytest.raises(ConfigError, match=r"model.expert=.*Pendulum-v1.*CartPole-v1"):
        Imitation(env_spec("CartPole-v1"), expert=str(path))
    with pytest.raises(ConfigError, match=r"model\.expert=.*no such file"):
        Imitation(env_spec("CartPole-v1"), expert=str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="holds no policy"):
        Imitation(env_spec("CartPole-v1"), expert=str(tmp_path / "other.ckpt"))


class Balance(Expert):
    """CartPole-v1 by hand."""

    def __init__(self, spec, strength=10.0):
        self.strength = strength

    def output(self, observations):
        position, speed, angle, turning = observations.unbind(-1)
        push = self.strength * (angle + turning + 0.1 * position + 0.2 * speed)
        return torch.stack([-push, push], -1)


class Undefined(Balance):
    """Everywhere but at the origin."""

    def output(self, observations):
        return super().output(observations).where(observations.eq(0).all(-1, keepdim=True), torch.nan)


def test_a_policy_of_ones_own_that_returns_no_numbers_is_named():
    with pytest.raises(ConfigError, match=r"Undefined.*its output holds NaN for observations that it came to"):
        other_learners(1, expert=Undefined(None))


@pytest.mark.parametrize("expert", ["test_imitation.Balance", Balance(None)])
def test_learners_do_what_a_policy_of_ones_own_does(expert, tmp_path):
    module = other_learners(25, expert=expert)
    assert evaluate(module.distilled(), learners=50, greedy=True).mean > 300  # untaught learners reach 10
    module.trainer.save_checkpoint(tmp_path / "own.ckpt")
    state = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert state["env_steps"] == module.env_steps, "checkpoints hold no objects"


def test_observations_are_normalised_as_a_policy_of_ones_own_meets_them():
    states = []

    class Seen(Balance):
        def output(self, observations):
            states.append(observations)
            return super().output(observations)

    module = other_learners(1, Untrained, expert=Seen)
    met = torch.cat([state for state in states[1:] if len(state) == 16][:1000])
    dataset = module.distilled()
    torch.testing.assert_close(dataset.observation_mean, met.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dataset.observation_std, met.std(0), atol=1e-4, rtol=1e-3)


class Network(nn.Module, Expert):
    """With all that learns in it: a network, parameters for noise and normaliser, and doubles."""

    def __init__(self, spec):
        super().__init__()
        self.body = nn.Linear(3, 1).double()
        self.log_std, self.mean = (nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (1, 3))
        self.std = nn.Parameter(torch.ones(3))

    def output(self, observations):
        return self.body(observations.double())


def test_nothing_of_a_policy_of_ones_own_is_trained():
    module = small_run("Pendulum-v1", Imitation, expert=Network, pairs=4, learners=4, iterations=1)
    assert module.iteration == 1
    assert module.env_steps == 16 * 1000 + module.trainer.datamodule.env_steps
    assert not any("expert" in name for name in module.state_dict())
    assert module._expert.policy.body.weight.grad is None
    assert not module._expert.output(torch.zeros(2, 3)).requires_grad
    # As collectors' workers take it along: a tensor with a history cannot be copied.
    copied = copy.deepcopy(Imitation(env_spec("Pendulum-v1"), expert=Network, pairs=4))
    assert not any(buffer.requires_grad for buffer in copied.buffers())


class Noiseless(Expert):
    def __init__(self, spec, **parts):
        vars(self).update(parts)
        self.actions = spec.actions

    def output(self, observations):
        return observations.new_zeros(len(observations), self.actions)


@pytest.mark.parametrize(
    ("expert", "env", "message"),
    [
        (Noiseless, "Pendulum-v1", r"Noiseless'.*its log_std is None; allowed are tensors of floating-point"),
        (partial(Noiseless, log_std=-1.0), "Pendulum-v1", r"its log_std is -1\.0; allowed are tensors"),
        (partial(Noiseless, log_std=torch.tensor([-1])), "Pendulum-v1", r"its log_std is of torch\.int64; allowed are"),
        (partial(Noiseless, log_std=torch.tensor([-torch.inf])), "Pendulum-v1", r"its log_std is \[-inf\]; .*finite"),
        (partial(Noiseless, output=lambda observations: [0.0]), "CartPole-v1", r"its output is \[0\.0\]; allowed are"),
        (partial(Noiseless, log_std=torch.zeros(2)), "Pendulum-v1", r"its log_std has shape \[2\]; .*needs \[1\]"),
        (partial(Noiseless, mean=torch.zeros(4)), "CartPole-v1", r"its std is None; allowed are tensors"),
        (Balance, "Pendulum-v1", r"model\.expert='test_imitation\.Balance': ValueError: not enough values"),
        (MLP, "CartPole-v1", r"ValueError: MLP\.width=EnvSpec.*: allowed are integers"),
        (
            lambda spec: "cartpole_1d",
            "CartPole-v1",
            r"TypeError: is a str; allowed are subclasses of lightning_distill\.ex",
        ),
        ("test_imitation.Unbalanced", "CartPole-v1", r"model\.expert='test_imitation\.Unbalanced': AttributeError"),
        ("no_such_module.Balance", "CartPole-v1", r"ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_what_is_wrong_with_a_policy_of_ones_own_is_said(expert, env, message):
    with pytest.raises(ConfigError, match=message):
        Imitation(env_spec(env), expert=expert)


def test_why_the_module_of_a_policy_of_ones_own_cannot_be_imported_is_said(tmp_path, monkeypatch):
    package = tmp_path / "own_policies"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "saved.py").write_text("import what_is_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"own_policies\.saved\.Mine'.*No module named 'what_is_not_installed'"):
        Imitation(env_spec("CartPole-v1"), expert="own_policies.saved.Mine")


class Drawn(Imitation):
    """Keeps what each iteration imitates, and what its rollout saw."""

    def samples(self, rollout):
        samples = super().samples(rollout)
        self.drawn = [*getattr(self, "drawn", []), samples["observation"].flatten(0, 1)]
        self.rollouts = [*getattr(self, "rollouts", []), rollout["observation"].flatten(0, 1)]
        torch.testing.assert_close(self._expert.output(self.drawn[-1]), samples["expert"].flatten(0, 1))
        return samples


def rows(states):
    return {tuple(state) for state in states.tolist()}


def test_states_of_earlier_rollouts_are_imitated_too():
    plain = other_learners(3, Drawn)
    for drawn, rollout in zip(plain.drawn, plain.rollouts, strict=True):
        assert rows(drawn) == rows(rollout), "by default those of the rollout"

    module = other_learners(3, Drawn, replay=16 * 1000 + 640)
    assert [len(drawn) for drawn in module.drawn] == [640] * 3
    assert rows(module.drawn[0]) - rows(module.rollouts[0]), "of the expert's first episodes"
    assert rows(module.drawn[2]) & (rows(module.rollouts[0]) | rows(module.rollouts[1])) - rows(module.rollouts[2])
    again = other_learners(3, Drawn, replay=16 * 1000 + 640)
    assert torch.equal(again.drawn[2], module.drawn[2]), "the same seed, the same states"

    module = other_learners(3, Drawn, replay=640)
    assert rows(module.drawn[2]) <= rows(module.rollouts[2]), "older ones are forgotten"
    with pytest.raises(ConfigError, match=r"model\.replay=639: a rollout has 640 states; allowed are at least as many"):
        other_learners(1, replay=639)


def test_options_of_an_objective_that_imitation_lacks_are_refused(capsys):
    run = ["fit", "--data.env=CartPole-v1", "--model=Imitation", "--model.expert=cartpole_1d_plain"]
    for option in ("critic_warmup", "clip", "target_kl", "gamma", "gae_lambda", "value_coef"):
        with pytest.raises(SystemExit):
            main([*run, f"--model.{option}=1"])
        assert f"model.{option}" in capsys.readouterr().err


def test_configs_of_distillation_by_reward_serve_imitation(capsys):
    run = ["fit", "--config=conf/atari/pong.yaml", "--model=Imitation", "--model.expert=pong_l4", "--print_config"]
    with pytest.raises(SystemExit):
        main(run)
    options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert options["encoder_level"] == 4
    assert options["critic_optimizer"]["init_args"]["lr"] == 7.5e-4
    assert "clip" not in options


def test_what_was_distilled_elsewhere_is_said(caplog):
    Imitation(env_spec("InvertedPendulum-v4"), expert="inverted_pendulum", start="inverted_pendulum")
    said = [record.getMessage() for record in caplog.records]
    for option in ("expert", "start"):
        expected = f"model.{option}='inverted_pendulum': distilled from InvertedPendulum-v5, but data.env='InvertedPendulum-v4'"
        assert expected in said
    caplog.clear()
    MetaPPO(env_spec("InvertedPendulum-v5"), start="inverted_pendulum")
    assert not caplog.records


@pytest.mark.parametrize("model", [MetaPPO, PPO])
def test_a_run_clips_observations_as_the_dataset_that_it_starts_from_does(model, tmp_path):
    path = str(dataclasses.replace(load("inverted_pendulum"), observation_clip=1.5).save(tmp_path / "d.safetensors"))
    module = model(env_spec("InvertedPendulum-v5"), start=path)
    module._normaliser = module.running_normaliser()
    assert module.encode(torch.full((2, 4), -1e6)).eq(-1.5).all()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    again = model(env_spec("InvertedPendulum-v5"))
    again.on_load_checkpoint(checkpoint)
    assert again.observation_clip == 1.5
    if model is MetaPPO:
        assert module.distilled().observation_clip == 1.5


def test_a_trained_expert_clips_observations_as_it_did(tmp_path):
    path = str(dataclasses.replace(load("inverted_pendulum"), observation_clip=1.5).save(tmp_path / "d.safetensors"))
    module = small_run("InvertedPendulum-v5", PPO, iterations=1, start=path)
    module.trainer.save_checkpoint(tmp_path / "policy.ckpt")
    far = torch.full((3, 4), 50.0)
    expected = module.present_output(far)
    torch.testing.assert_close(expert_from(str(tmp_path / "policy.ckpt"), module.spec).output(far), expected)


def test_a_run_starts_from_a_dataset():
    dataset = load("inverted_pendulum")
    module = MetaPPO(env_spec(dataset.env), start="inverted_pendulum", observation_gain=0.3)
    begun = module.distilled()
    for name in ("observations", "targets", "learning_rate", "log_std", "observation_mean", "observation_std"):
        torch.testing.assert_close(getattr(begun, name), getattr(dataset, name), msg=name, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"model.start='inverted_pendulum'.*\[64, 4\].*model.pairs"):
        MetaPPO(env_spec(dataset.env), pairs=8, start="inverted_pendulum")
    with pytest.raises(ConfigError, match=r"newton_ridge.*model.step_rule='newton'"):
        MetaPPO(env_spec(dataset.env), step_rule="newton", start="inverted_pendulum")
    with pytest.raises(ConfigError, match="observations"):
        MetaPPO(env_spec("Hopper-v5"), start="inverted_pendulum")
