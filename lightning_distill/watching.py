"""A taught learner at play: in a video, without a display, or in a window."""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import DistilledDataset
from .envs import ConfigError, stream_seed
from .envs.rendering import in_window, make_rendered
from .evaluation import TEST_SEED
from .learners import LearnerFamily
from .matching import check_matches, played_in, trained_family
from .teaching import seeded, teach_many

logger = logging.getLogger(__name__)

#: More would make a GIF large, and many viewers do not show it.
GIF_FRAMES_PER_SECOND, GIF_PIXELS, GIF_COLOURS = 25, (608, 480), 128


@dataclass(frozen=True)
class Recording:
    """What was played: ``path`` of the video (None: in a window), ``steps`` and their undiscounted ``total`` reward."""

    path: Path | None
    steps: int
    total: float


def record(
    dataset: DistilledDataset,
    path: Path | None,
    *,
    env: str | None = None,
    family: LearnerFamily | None = None,
    seed: int = TEST_SEED,
    greedy: bool = False,
    steps: int = 1000,
) -> Recording:
    """Teach one fresh learner and record, or show in a window, how it plays one episode.

    Args:
        dataset: what it is taught on.
        path: ``.mp4`` (needs imageio-ffmpeg; without it a GIF is written) or ``.gif``; None: a window (needs pygame).
        env: another environment id than the dataset's own, as it is made by default.
        family: what the learner is drawn from; default: what the dataset was distilled with.
        seed: of the learner, the start state and the actions.
        greedy: largest logit or mean action, instead of sampled actions.
        steps: at most so many; the episode may end before.

    Raises:
        ConfigError: an argument cannot work, or the environment cannot be drawn on this machine.
    """
    if path is not None and path.suffix.lower() not in (".mp4", ".gif"):
        raise ConfigError(f"output={str(path)!r}: allowed are names that end in .mp4 or .gif")
    if steps < 1:
        raise ConfigError(f"steps={steps}: allowed are integers ≥ 1")
    spec = played_in(dataset, env)
    check_matches(dataset, spec)
    if path is not None and path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        path = path.with_suffix(".gif")
        if path.exists():  # not what was to be replaced
            raise ConfigError(
                f"output: MP4 needs imageio-ffmpeg (pip install imageio-ffmpeg), and {str(path)!r} is there already"
            )
        logger.warning("MP4 needs imageio-ffmpeg (pip install imageio-ffmpeg): writing %s instead", path)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    made = make_rendered(spec.id, spec.kwargs)
    if path is None:
        try:
            made = in_window(made)
        except ConfigError:
            made.close()
            raise
    played = {"steps": 0, "total": 0.0}

    def frames() -> Iterator[np.ndarray]:
        observation, _ = made.reset(seed=stream_seed(seed, 2, evaluation=True))
        yield made.render()
        for _ in range(steps):
            action = policy(np.asarray(observation)[None], sample=not greedy)[0]
            if dataset.action_type == "continuous":
                action = np.clip(action, made.action_space.low, made.action_space.high)
            observation, reward, terminated, truncated, _ = made.step(action)
            played["steps"] += 1
            played["total"] += float(reward)
            yield made.render()
            if terminated or truncated:
                return

    try:
        with seeded(stream_seed(seed, 1, evaluation=True)):
            policy = teach_many(family or trained_family(dataset), dataset, 1)
            if path is None:
                deque(frames(), maxlen=0)  # the window shows them
            else:
                write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
                write(path, frames(), made.metadata.get("render_fps", 30))
    finally:
        made.close()
    return Recording(path, **played)


def _write_gif(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    from PIL import Image

    every = max(1, round(fps / GIF_FRAMES_PER_SECOND))
    images = []
    for index, frame in enumerate(frames):
        if index % every == 0:
            image = Image.fromarray(frame)
            image.thumbnail(GIF_PIXELS)
            images.append(image.quantize(GIF_COLOURS, Image.Quantize.FASTOCTREE))
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 * every / fps), loop=0)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    import imageio

    # A codec takes even sizes only: the last row or column may be lost.
    with imageio.get_writer(path, fps=fps, macro_block_size=1) as writer:
        for frame in frames:
            writer.append_data(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
