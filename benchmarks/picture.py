"""The README's pictures: the pairs of cart-pole, and a fresh HalfCheetah learner at play after its one step.

python benchmarks/picture.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from lightning_distill import load
from lightning_distill.pictures import draw_pairs
from lightning_distill.watching import record

DOCS = Path(__file__).parents[1] / "docs"
#: Frames of the strip: the first, how far apart, how many; and what is shown of each (left, top, right, bottom).
FIRST, EVERY, FRAMES, CROP = 60, 3, 5, (10, 180, 470, 440)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs = Image.open(draw_pairs(load("cartpole_1d_plain"), Path(folder) / "pairs.png"))
        pairs.crop((0, 30, pairs.width, 340)).quantize(64).save(DOCS / "cartpole_pairs.png", optimize=True)
        video = record(load("halfcheetah_plain"), Path(folder) / "video.gif", steps=FIRST + EVERY * FRAMES)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(video.path))]
    left, top, right, bottom = CROP
    shown = [frame[top:bottom, left:right] for frame in frames[FIRST : FIRST + EVERY * FRAMES : EVERY]]
    gap = np.full((bottom - top, 8, 3), 255, np.uint8)
    strip = np.concatenate([part for frame in shown for part in (frame, gap)][:-1], 1)
    Image.fromarray(strip).quantize(64).save(DOCS / "halfcheetah_strip.png", optimize=True)
    print(f"return of the recorded learner in {video.steps} steps: {video.total:.0f}")


if __name__ == "__main__":
    main()
