"""``model.compile``: the same learning from compiled losses, and errors that say what cannot be compiled."""

import shutil
from functools import partial

import pytest
import torch
from test_meta_ppo import small_run
from torch import nn

from lightning_distill import PPO, ConfigError, MetaPPO
from lightning_distill.cli import main
from lightning_distill.envs import env_spec
from lightning_distill.imitation import Imitation

LEARNED = {"epochs": 2, "minibatches": 2}


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced and differentiated as ever, but run by PyTorch's own operators: seconds sooner; with the tanh of AMD's
    processors in what is not compiled."""
    monkeypatch.setattr("lightning_distill.activations.LOGISTIC_TANH", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


class Counted(MetaPPO):
    """How often Python computes the losses, tracing apart: in each minibatch, unless they are compiled."""

    calls = 0

    def losses(self, batch, learns):
        Counted.calls += not torch.compiler.is_compiling()
        return super().losses(batch, learns)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("env", "model", "options"),
    [
        ("Pendulum-v1", PPO, {"entropy_coef": 0.01}),
        ("Pendulum-v1", MetaPPO, {"critic_warmup": 1}),
        ("CartPole-v1", MetaPPO, {"target_kl": 1e-7, "epochs": 3}),
        ("CartPole-v1", MetaPPO, {"step_rule": "line_search"}),
        ("CartPole-v1", MetaPPO, {"step_rule": "projection"}),
        (
            "CartPole-v1",
            Imitation,
            {"expert": "cartpole_1d_plain", "pairs": 3, "learners": 4, "data": {"env_steps": 16 * 1000 + 640}},
        ),
    ],
)
def test_compiled_losses_teach_the_same(env, model, options):
    options = {**LEARNED, **options}
    modules = [small_run(env, model, compile=compiled, **options) for compiled in (False, True)]
    eager, compiled = (module.state_dict() for module in modules)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6, msg=name)
    logged = [module.trainer.callback_metrics for module in modules]
    assert logged[0].keys() == logged[1].keys()
    for name in logged[0].keys() & {"policy/kl", "policy/updates", "loss/policy", "gradient/actor"}:
        torch.testing.assert_close(logged[1][name], logged[0][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.usefixtures("traced")
def test_python_is_out_of_the_loop():
    for compiled, calls in ((False, 8), (True, 0)):
        Counted.calls = 0
        small_run(model=Counted, pairs=3, learners=4, compile=compiled, **LEARNED)
        assert Counted.calls == calls


@pytest.mark.usefixtures("traced")
def test_a_run_goes_on_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["fit", "--data.env=CartPole-v1", "--data.num_envs=8", "--data.rollout_length=16", "--model.learners=2"]
    run += ["--held_out.families=[]", "--data.val_learners=1", "--data.test_learners=1", "--data.episodes=1"]
    main([*run, "--data.env_steps=256", "--model.compile=true"])
    main([*run, "--data.env_steps=512", "--ckpt_path=last"])
    assert "going on from" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_code_gives_the_gradients():
    eager, compiled = (small_run(compile=compiled, iterations=1, **LEARNED) for compiled in (False, True))
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_what_cannot_be_compiled_is_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.compile=true with frames: allowed is false"):
        MetaPPO(env_spec("ALE/Pong-v5"), family="nature", compile=True)
    with pytest.raises(ConfigError, match=r"model\.compile=true: .*; allowed here is false"):
        small_run(family=lambda shape, outputs: nn.Linear(*shape, outputs), compile=True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no_such_compiler",))
    with pytest.raises(ConfigError, match=r"model\.compile=true: .*No working C\+\+ compiler"):
        small_run(compile=True, learners=2)
