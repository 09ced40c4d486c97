import pytest

from lightning_distill import evaluate, load
from lightning_distill.dataset import zoo

LEARNERS, LEARNERS_FRAMES = 8, 4


@pytest.mark.parametrize("name", zoo())
def test_shipped_dataset_gives_about_the_return_that_it_states(name):
    dataset = load(name)
    stated = dataset.metadata["returns"]["in-distribution"]["sampled"]
    learners = LEARNERS_FRAMES if is_of_frames(dataset) else LEARNERS
    found = evaluate(dataset, learners=learners)
    # Four standard errors of a mean of so few learners: a wrong file or environment is far outside.
    by_chance = 4 * stated["std"] / learners**0.5 + 0.01 * abs(stated["mean"])
    assert abs(found.iqm - stated["iqm"]) <= by_chance
    # One that falls at once, as 1 in 100 may without being among those that the file states, moves the mean of so few.
    assert abs(found.mean - stated["mean"]) <= by_chance + abs(stated["mean"]) / learners


@pytest.mark.parametrize("name", zoo())
def test_shipped_dataset_says_how_it_was_made(name):
    metadata = load(name).metadata
    assert metadata["command"].startswith("lightning fit --config conf/")
    assert metadata["env_steps"] > 0
    assert metadata["license"] == "MIT"
    assert metadata["returns"]["in-distribution"]["sampled"]["learners"] == (32 if is_of_frames(load(name)) else 100)


def is_of_frames(dataset):
    """Whole games, through a convolutional network: as many learners as others have would take minutes."""
    return len(dataset.observation_shape) == 3
