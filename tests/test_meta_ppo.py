from pathlib import Path

import lightning as L
import probes  # noqa: F401  registers the probe environments
import pytest
import torch

from lightning_distill import MLP, CollectorDataModule, ConfigError, MetaPPO, evaluate_all, teach_many
from lightning_distill.envs import EnvSpec, env_spec
from lightning_distill.objectives import generalized_advantages
from lightning_distill.optimizing import clipped_step
from lightning_distill.ppo import PPO
from lightning_distill.returns import IN_DISTRIBUTION, UNTAUGHT

SPECS = {
    "discrete": EnvSpec("CartPole-v1", (4,), "discrete", 2),
    "continuous": EnvSpec("Some-v0", (3,), "continuous", 2, (-1.0, -2.0), (1.0, 2.0)),
}


def trainer(**kwargs):
    options = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "accelerator": "cpu",
    }
    return L.Trainer(**{**options, **kwargs})


def small_run(env="CartPole-v1", model=MetaPPO, callbacks=(), seed=1, iterations=2, data=None, **kwargs):
    L.seed_everything(seed, verbose=False)
    data = CollectorDataModule(
        env,
        **{"env_steps": 16 * 20 * iterations, "num_envs": 16, "rollout_length": 20, "backend": "auto", **(data or {})},
    )
    if model is MetaPPO:
        kwargs = {"pairs": 3, "learners": 4, **kwargs}
    module = model(data.spec, **kwargs)
    trainer(callbacks=list(callbacks)).fit(module, data)
    return module


class Watch(L.Callback):
    """Keeps each rollout, and what learners looked like when it was made."""

    def __init__(self):
        self.rollouts, self.fresh, self.taught = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rollouts.append(batch.clone())
        if isinstance(pl_module, MetaPPO):
            self.fresh.append(pl_module._fresh["0.weight"].clone())
        self.taught.append(pl_module._acting["0.weight"].clone())


class Changes(L.Callback):
    """Keeps, of each iteration, the parts of the module whose parameters changed."""

    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = {name: value.clone() for name, value in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        changed = {name for name, value in pl_module.named_parameters() if not value.equal(self.before[name])}
        self.found.append({name.partition(".")[0] for name in changed})


def prepared(kind, seed=0):
    """A module in float64 that is ready to compute its policy loss on made-up samples."""
    torch.manual_seed(seed)
    module = MetaPPO(SPECS[kind], pairs=3, learners=2, family=MLP(width=5, output_gain=1.0)).double()
    module._fresh = {name: value.double() for name, value in module.family.draw(2, *_shapes(module)).items()}
    shape = module.spec.observation_shape
    module._normaliser = torch.randn(shape).double(), torch.rand(shape).double() + 0.5
    observation = torch.randn(2, 6, *module.spec.observation_shape).double()
    action = torch.randint(2, (2, 6)) if kind == "discrete" else torch.randn(2, 6, 2).double()
    batch = {
        "observation": observation,
        "action": action,
        "log_prob": -torch.rand(2, 6).double(),
        "advantage": torch.randn(2, 6).double(),
    }
    return module, batch


def policy_loss(module, batch):
    return module._policy_loss(batch | module._inputs(batch["observation"]))


def _shapes(module):
    return module.spec.observation_shape, module.spec.actions


@pytest.mark.parametrize("kind", SPECS)
def test_meta_gradient_of_the_ppo_loss_is_that_of_finite_differences(kind):
    module, batch = prepared(kind)
    module.clip = 10.0  # the clipped surrogate has kinks, which finite differences may straddle
    loss, *_ = policy_loss(module, batch)
    loss.backward()
    step = 1e-6
    for name, parameter in module.actor.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 5)):
            kept = flat[index].item()
            values = []
            for shift in (step, -step):
                flat[index] = kept + shift
                values.append(policy_loss(module, batch)[0].item())
            flat[index] = kept
            assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8), (
                name
            )


@pytest.mark.parametrize("kind", SPECS)
def test_gradient_reaches_every_synthetic_parameter_and_nothing_else(kind):
    module, batch = prepared(kind)
    loss, entropy, _ = policy_loss(module, batch)
    (loss - 0.1 * entropy).backward()
    names = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert names == {name for name, _ in module.named_parameters() if name.startswith("actor.")}
    assert all(parameter.grad.abs().max() > 0 for parameter in module.actor.parameters())
    assert not any(value.requires_grad for value in module._fresh.values())


def test_entropy_bonus_carries_gradient():
    module, batch = prepared("discrete")
    _, entropy, _ = policy_loss(module, batch)
    gradients = torch.autograd.grad(entropy, list(module.actor.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_first_minibatch_is_on_policy(env):
    """The ratio is 1 until the first update: a stale rollout or another θ₀ would show here."""

    class FirstRatio(MetaPPO):
        seen = None

        def _update(self, samples):
            self.seen = [*(self.seen or []), policy_loss(self, samples)[2].abs().max().item()]
            return super()._update(samples)

    module = small_run(env, FirstRatio, iterations=4, pairs=3, learners=4)
    assert len(module.seen) == 4
    assert max(module.seen) < 1e-4


def test_learners_are_drawn_afresh_for_each_rollout_and_again_by_the_same_seed():
    watches = [Watch() for _ in range(3)]
    for watch, seed in zip(watches, (1, 1, 2), strict=True):
        small_run(callbacks=[watch], seed=seed, iterations=3, lifetime=1)
    first, again, other = watches
    assert all(torch.equal(a, b) for a, b in zip(first.fresh, again.fresh, strict=True))
    drawn = torch.cat([*first.fresh, *other.fresh]).flatten(1)
    assert len(drawn.unique(dim=0)) == 2 * 3 * 4, "no learner is seen twice"
    assert torch.equal(first.rollouts[2]["observation"], again.rollouts[2]["observation"])


def test_learners_live_for_so_many_rollouts_and_are_taught_anew_in_each():
    brief, lasting = Watch(), Watch()
    small_run(callbacks=[brief], iterations=5, lifetime=1)
    small_run(callbacks=[lasting], iterations=5, lifetime=2)
    fresh = lasting.fresh
    assert torch.equal(fresh[0], fresh[1])
    assert torch.equal(fresh[2], fresh[3])
    assert not torch.isclose(fresh[1], fresh[2]).all((1, 2)).any()
    assert not torch.isclose(fresh[3], fresh[4]).all((1, 2)).any()
    assert not torch.equal(lasting.taught[0], lasting.taught[1])
    assert torch.equal(brief.fresh[0], fresh[0])
    assert not torch.equal(lasting.rollouts[0]["action"], lasting.rollouts[1]["action"]), "randomness goes on"


@pytest.mark.parametrize(
    ("env", "backend"),
    [("CartPole-v1", "auto"), ("HalfCheetah-v5", "auto"), ("HalfCheetah-v5", "gymnasium")],
)
def test_the_same_seed_gives_the_same_dataset_bit_for_bit(env, backend):
    first, again = (small_run(env, iterations=3, data={"backend": backend}) for _ in range(2))
    other = small_run(env, iterations=3, data={"backend": backend}, seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.observation_moments.mean, other.observation_moments.mean)


def test_nothing_of_an_update_is_left_behind():
    module = small_run()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_each_state_has_the_critics_value_as_a_next_state_too(monkeypatch):
    """Next states are not valued a second time; at ends of episodes and rollouts they are no state acted in.

    What is said to follow a terminal state does not count.
    """
    given, expected = [], []

    def record(reward, value, next_value, terminated, *arguments):
        given.append(next_value.masked_fill(terminated, 0.0))
        return generalized_advantages(reward, value, next_value, terminated, *arguments)

    class Expected(MetaPPO):
        def samples(self, rollout):
            value = self.critic(self.encode(rollout["next", "observation"])).detach()
            expected.append(value.masked_fill(rollout["next", "terminated"], 0.0).squeeze(-1))
            return super().samples(rollout)

    monkeypatch.setattr("lightning_distill.ppo.generalized_advantages", record)
    watch = Watch()
    small_run("CartPole-v1", Expected, [watch], pairs=3, learners=4, data={"backend": "gymnasium"})
    assert watch.rollouts[0]["next", "done"].any()
    for found, value in zip(given, expected, strict=True):
        torch.testing.assert_close(found, value)


def test_actor_stops_at_the_target_kl_and_the_critic_goes_on(monkeypatch):
    steps = []

    def count(optimizer, params, max_norm):
        before = params[0].detach().clone()
        norm = clipped_step(optimizer, params, max_norm)
        steps.append((len(params), bool((params[0] != before).any())))
        return norm

    monkeypatch.setattr("lightning_distill.rollout_module.clipped_step", count)

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    counts = Count()
    before = small_run(iterations=1, data={"env_steps": 1}, epochs=4, target_kl=1e9, callbacks=[counts])
    assert counts.metrics["policy/updates"] == 16
    stopped = Count()
    steps.clear()
    module = small_run(iterations=1, target_kl=1e-12, callbacks=[stopped])
    assert stopped.metrics["policy/updates"] == 1, "the first minibatch is on-policy, the second is not"
    critic, actor = (len(list(part.parameters())) for part in (module.critic, module.actor))
    assert steps == [(critic, True), (actor, True)] + 39 * [(critic, True)]
    assert before.env_steps == 320


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
def test_advantages_are_standardised_however_far_from_zero_they_are(offset):
    module = MetaPPO(SPECS["discrete"])
    module._sum_over_processes = lambda tensor: tensor
    advantage = torch.randn(16, 50) + offset
    found = module._standardised(advantage)
    assert found.dtype == torch.float32
    exact = advantage.double()
    torch.testing.assert_close(found.double(), (exact - exact.mean()) / exact.std(correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [MetaPPO, PPO])
def test_in_its_warmup_the_critic_alone_learns(model):
    changes = Changes()
    small_run(iterations=3, model=model, critic_warmup=2, callbacks=[changes])
    assert changes.found == [{"critic"}, {"critic"}, {"critic", "actor"}]


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"model.critic_warmup=2: the run has 2 iterations, allowed are fewer"):
        small_run(iterations=2, critic_warmup=2)


def test_counters_and_normalisers_take_in_everything():
    watch = Watch()
    module = small_run(iterations=3, callbacks=[watch])
    seen = torch.cat([rollout["next", "observation"].flatten(0, 1) for rollout in watch.rollouts]).double()
    torch.testing.assert_close(module.observation_moments.mean, seen.mean(0))
    torch.testing.assert_close(module.observation_moments.variance, seen.var(0, unbiased=False))
    assert module.env_steps == len(seen) == 960
    assert module.iteration == 3


def test_a_reward_that_is_not_a_number_is_named():
    with pytest.raises(ConfigError, match=r"ProbeNotANumber-v0.*reward"):
        small_run("ProbeNotANumber-v0")


def test_environments_must_be_shared_out_evenly():
    with pytest.raises(ConfigError, match=r"data.num_envs=16.*model.learners=5"):
        small_run(learners=5)


def test_a_precision_in_which_gradients_or_samples_are_others_is_refused():
    data = CollectorDataModule("CartPole-v1", env_steps=320, num_envs=16, rollout_length=20)
    with pytest.raises(ConfigError, match=r"trainer.precision='64-true': allowed are 32-true, bf16-mixed"):
        trainer(precision="64-true").fit(MetaPPO(data.spec), data)


def none(optimizer, iterations):
    raise AssertionError


@pytest.mark.parametrize(
    ("argument", "make", "reason"),
    [
        ("optimizer", torch.optim.LBFGS, "closure"),
        ("optimizer", torch.optim.Muon, "2D"),
        ("critic_optimizer", torch.optim.SparseAdam, "dense"),
        ("critic_optimizer", lambda params: torch.optim.SGD(params, lr=-1), "-1"),
        ("optimizer", lambda params: torch.optim.SGD([p for p in params if p.ndim > 1], lr=1.0), "ndim"),
        ("scheduler", torch.optim.lr_scheduler.OneCycleLR, "total_steps"),
        ("scheduler", none, "iterations, 2 .AssertionError"),
    ],
)
def test_an_optimiser_or_scheduler_that_cannot_work_is_refused_at_once(argument, make, reason):
    with pytest.raises(ConfigError, match=rf"model\.{argument}: .*{reason}.*allowed"):
        small_run(**{argument: make})


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("pairs", 0, "v>0"),
        ("learners", -1, "v>0"),
        ("lifetime", 1.5, "integer"),
        ("epochs", 0, "v>0"),
        ("minibatches", "4", "text"),
        ("gamma", 2, "v<=1"),
        ("target_kl", float("nan"), "v>0"),
        ("entropy_coef", -0.1, "v>=0"),
        ("learning_rate", 0.0, "v>0"),
        ("critic_warmup", True, "number"),
    ],
)
def test_numbers_that_are_not_allowed_are_refused_in_python_too(argument, value, allowed):
    with pytest.raises(ConfigError, match=rf"model\.{argument}={value!r}: .*{allowed}"):
        MetaPPO(SPECS["discrete"], **{argument: value})


def test_sizes_of_rollouts_that_are_not_allowed_are_refused_in_python_too():
    with pytest.raises(ConfigError, match=r"data\.num_envs=0: .*v>0"):
        CollectorDataModule("CartPole-v1", num_envs=0)


def test_numbers_of_other_kinds_are_numbers():
    assert MetaPPO(SPECS["discrete"], pairs=torch.tensor(3).numpy()[()], gamma=1).synthetic_batch.pairs == 3


@pytest.mark.parametrize(("actions", "pairs"), [(2, 2), (9, 6), (18, 10)])
def test_pairs_that_are_not_given_are_the_papers_minimum(actions, pairs):
    assert MetaPPO(EnvSpec("Some-v0", (4,), "discrete", actions)).synthetic_batch.pairs == pairs
    assert MetaPPO(SPECS["continuous"]).synthetic_batch.pairs == 64


def preference(env, gamma=0.99, model=MetaPPO, iterations=40):
    """Probability of action 1 in the first state, of the policies at the end, per sign of the observation."""
    watch = Watch()
    # Learners see what they were distilled for: enough steps for a policy to settle on one of two actions.
    options = {"gamma": gamma, "optimizer": lambda p: torch.optim.Adam(p, lr=0.02), "epochs": 4, "target_kl": 0.05}
    module = small_run(env, model, [watch], iterations=iterations, **options)
    module.begin_rollout()
    observations = torch.tensor([[-1.0], [1.0]])
    inputs = module.encode(observations, module._acting_normaliser).expand(module.learners, 2, 1)
    output = module.family.forward(module._acting, inputs)
    return output.softmax(-1)[..., 1].mean(0).tolist()


@pytest.mark.parametrize("model", [MetaPPO, PPO])
def test_probe_the_sign_of_the_advantage(model):
    negative, positive = preference("ProbeContext-v0", model=model)
    assert negative < 0.2
    assert positive > 0.8


@pytest.mark.parametrize(("gamma", "waits"), [(0.3, False), (0.99, True)])
def test_probe_discounting(gamma, waits):
    first_state, _ = preference("ProbeNowOrLater-v0", gamma)
    assert first_state > 0.7 if waits else first_state < 0.3


def test_probe_terminal_states_and_time_limits():
    _, positive = preference("ProbeEndOrTimeLimit-v0", gamma=0.9)
    assert positive > 0.7


def test_noise_falls_to_its_final_share_late():
    class Seen(MetaPPO):
        seen = ()

        def begin_rollout(self):
            super().begin_rollout()
            with torch.no_grad():
                noise = self.actor.noise
                self.seen = (*self.seen, (self.log_std - noise.log_half_range - noise.relative).exp())

    module = small_run("Pendulum-v1", Seen, iterations=10, pairs=3, learners=4, final_noise=0.2)
    shares = torch.stack(module.seen).squeeze(1)
    assert torch.allclose(shares[:-3], torch.ones(()))
    assert torch.allclose(shares[-3:], torch.tensor([0.8, 0.6, 0.4]))
    assert torch.allclose(module.distilled().log_std, module.log_std)
    for name, value in (("final_noise", 1.5), ("noise_falls_from", 1.0)):
        with pytest.raises(ConfigError, match=rf"model\.{name}={value}"):
            MetaPPO(SPECS["continuous"], **{name: value})


def test_noise_at_its_minimum_can_grow_again():
    module = MetaPPO(SPECS["continuous"], log_std=-1.4, log_std_min=-1.5)
    noise = module.actor.noise
    optimizer = torch.optim.SGD(noise.parameters(), lr=1.0)
    seen = []
    for wanted in (-1.0, 0.25):  # less noise, then more
        optimizer.zero_grad()
        (-wanted * module.log_std.sum()).backward()
        optimizer.step()
        noise.keep_minimum()
        seen.append((module.log_std - noise.log_half_range).detach().round(decimals=5).unique().tolist())
    assert seen == [[-1.5], [-1.25]]


def test_what_cannot_be_learned_from_is_named():
    with pytest.raises(ConfigError, match=r"model\.minibatches=4: a rollout has 2 samples"):
        small_run(learners=8, data={"rollout_length": 1})
    data = CollectorDataModule("CartPole-v1", env_steps=640, num_envs=16, rollout_length=20)
    for option in ("max_steps", "max_epochs", "check_val_every_n_epoch"):
        with pytest.raises(ConfigError, match=rf"trainer\.{option}=5"):
            trainer(**{option: 5}).fit(MetaPPO(data.spec, learners=4), data)
    for spec, options, message in (
        ("CartPole-v1", {}, r"model\.spec='CartPole-v1': allowed is a data module's spec"),
        (data.spec, {"start": Path("batch.safetensors")}, r"model\.start: is a PosixPath; allowed is .* as text"),
        (data.spec, {"lifetime": None}, r"model\.lifetime=None: .*allowed is PositiveInt"),
    ):
        with pytest.raises(ConfigError, match=message):
            MetaPPO(spec, **options)
    with pytest.raises(ConfigError, match=r"data\.env='CartPole-v1'.*the module was made for 'CartPole-v0'"):
        trainer().fit(MetaPPO(env_spec("CartPole-v0"), learners=4), data)
    with pytest.raises(ConfigError, match=r"data\.env=None: allowed are"):
        CollectorDataModule(None)
    with pytest.raises(ConfigError, match=r"model\.observation_gain=0\.5: frames"):
        MetaPPO(env_spec("ALE/Pong-v5"), family="nature", observation_gain=0.5)


def test_noise_is_learned_at_a_rate_of_its_own():
    """Adam's first step is the learning rate, whatever the gradient."""

    def moved(rate):
        torch.manual_seed(0)
        options = {"epochs": 1, "minibatches": 1, "log_std": -0.3}
        module = small_run("Pendulum-v1", MetaPPO, iterations=1, pairs=3, learners=4, noise_rate=rate, **options)
        return (module.actor.noise.relative + 0.3).abs().item()

    assert moved(1.0) == pytest.approx(1e-3, rel=0.05)
    assert moved(0.2) == pytest.approx(2e-4, rel=0.05)


def test_a_small_gain_makes_taught_learners_alike():
    """Nearly linear networks with orthogonal layers are all the same kernel, whichever was drawn."""

    def spread(gain):
        torch.manual_seed(0)
        module = MetaPPO(SPECS["continuous"], observation_gain=gain, observation_scale=gain)
        outputs = teach_many(MLP(), module.distilled(), 32).output(observations.expand(32, 100, 3))
        return (outputs.std(0) / outputs.square().mean(0).sqrt()).mean().item()

    torch.manual_seed(0)
    observations = torch.randn(100, 3)
    assert spread(0.05) < 0.3 * spread(1.0)


def test_pairs_learn_to_teach():
    """The whole of it: three pairs, 100 k steps, and networks that were not there when it learned."""
    module = small_run(
        data={"env_steps": 100_000, "num_envs": 64, "rollout_length": 50}, pairs=3, learners=8, epochs=10, minibatches=4
    )
    table = evaluate_all(module.distilled(), kinds=("sampled",), learners=30)
    assert table[IN_DISTRIBUTION]["sampled"].mean > 200
    assert table[UNTAUGHT]["sampled"].mean < 60
