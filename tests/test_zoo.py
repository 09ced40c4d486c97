import pytest

from lightning_distill import evaluate, load
from lightning_distill.dataset import zoo

LEARNERS = 8


@pytest.mark.parametrize("name", zoo())
def test_shipped_dataset_gives_about_the_return_that_it_states(name):
    dataset = load(name)
    stated = dataset.metadata["returns"]["in-distribution"]["sampled"]
    found = evaluate(dataset, learners=LEARNERS)
    # Four standard errors of a mean of so few learners: a wrong file or environment is far outside.
    assert abs(found.mean - stated["mean"]) <= 4 * stated["std"] / LEARNERS**0.5 + 0.01 * abs(stated["mean"])


@pytest.mark.parametrize("name", zoo())
def test_shipped_dataset_says_how_it_was_made(name):
    metadata = load(name).metadata
    assert metadata["command"].startswith("lightning fit --config conf/")
    assert metadata["env_steps"] > 0
    assert metadata["license"] == "MIT"
    assert metadata["returns"]["in-distribution"]["sampled"]["learners"] == 100
