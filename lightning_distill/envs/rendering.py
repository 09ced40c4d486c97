"""Environments drawn without a display: frames of Gymnasium environments, and of the N-dimensional cart-pole."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .spec import ConfigError, reason

if TYPE_CHECKING:
    import gymnasium

NO_OPENGL = (
    "MuJoCo draws through OpenGL: on Debian or Ubuntu install libegl1 and libgl1-mesa-dri and set MUJOCO_GL=egl, "
    "or libosmesa6 and MUJOCO_GL=osmesa (no graphics driver needed)"
)

# Pixels; multiples of 16, which video codecs ask for.
WIDTH, LANE_HEIGHT = 608, 176
PIXELS_PER_METRE = 115


def make_rendered(env: str, kwargs: dict[str, Any] | None = None) -> gymnasium.Env:
    """A Gymnasium environment that has been reset and whose ``render()`` returns frames [height, width, 3], uint8.

    Raises:
        ConfigError: it cannot be made, or cannot be drawn on this machine; the message says what to install.
    """
    from gymnasium.wrappers import TimeLimit

    from . import _gymnasium_env, _torchrl_class
    from .atari import RenderedAtari, atari_spec, rom_of
    from .cartpole import DIMENSIONS, MAX_STEPS, GymnasiumCartPole

    kwargs = dict(kwargs or {})
    if _torchrl_class(env) is not None:
        raise ConfigError(f"env={env!r} is a TorchRL environment, which cannot be drawn; allowed are Gymnasium's")
    if env in DIMENSIONS and not kwargs:
        # Gymnasium's own CartPole-v1 is the same environment, but needs pygame to be drawn.
        made = TimeLimit(GymnasiumCartPole(DIMENSIONS[env], render_mode="rgb_array"), MAX_STEPS)
    elif rom_of(env) is not None:
        made = RenderedAtari(atari_spec(env, kwargs))
    else:
        _choose_opengl()
        try:
            made = _gymnasium_env(env, {**kwargs, "render_mode": "rgb_array"})
        except ConfigError as error:
            if not (isinstance(error.__cause__, TypeError) and "render_mode" in str(error.__cause__)):
                raise
            raise ConfigError(
                f"env={env!r} cannot be drawn: its constructor takes no render_mode='rgb_array'"
            ) from error
    # What is left of a half-made viewer complains when it is deleted; the error says it already.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        problem = _why_not_drawn(made)
    finally:
        sys.unraisablehook = hook
    if problem is not None:
        with contextlib.suppress(Exception):
            made.close()
        advice = f". {NO_OPENGL}" if hasattr(made.unwrapped, "model") else ""
        raise ConfigError(f"env={env!r} cannot be drawn here: {problem}{advice}")
    return made


def in_window(rendered: gymnasium.Env) -> gymnasium.Env:
    """The environment of :func:`make_rendered` in a window that shows each step, at its own speed.

    Raises:
        ConfigError: there is no display, or pygame is missing.
    """
    from gymnasium.wrappers import HumanRendering

    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("no display to open a window on; -o NAME.gif writes a video instead")
    if importlib.util.find_spec("pygame") is None:
        raise ConfigError("a window needs pygame (pip install pygame); -o NAME.gif writes a video instead")
    return HumanRendering(rendered)


def _why_not_drawn(made: gymnasium.Env) -> str | None:
    try:
        made.reset(seed=0)
        _follow(made.unwrapped)
        frame = made.render()
    except Exception as error:  # every backend fails in its own way
        return reason(error).rstrip(".")
    drawn = isinstance(frame, np.ndarray) and frame.ndim == 3
    return None if drawn else f"it renders a {type(frame).__name__}, not a frame"


def _choose_opengl() -> None:
    """MuJoCo's own choice on Linux is a window; without a display, take what draws off screen."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "osmesa"


def _follow(simulator: Any) -> None:
    """MuJoCo's bodies run out of Gymnasium's picture (1.4), unless it is taken by the model's own camera."""
    renderer = getattr(simulator, "mujoco_renderer", None)
    if renderer is not None:
        import mujoco

        # -1, where the model has no such camera, is Gymnasium's own.
        renderer.camera_id = mujoco.mj_name2id(simulator.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")


def draw_cart_poles(state: np.ndarray, force: np.ndarray) -> np.ndarray:
    """N cart-poles under one another as a frame [176 N, 608, 3], uint8.

    Args:
        state: [N, 4], position (m), velocity, angle (rad) and angular velocity of each.
        force: [N], the last push on each (N); an arrow shows it.
    """
    from PIL import Image, ImageDraw

    from .cartpole import HALF_LENGTH, MAX_POSITION

    scale = 2  # drawn larger and reduced, for smooth edges
    lanes, height = len(state), LANE_HEIGHT * scale
    width, metre = WIDTH * scale, PIXELS_PER_METRE * scale
    image = Image.new("RGB", (width, lanes * height), "white")
    draw = ImageDraw.Draw(image)
    for lane, ((x, _, theta, _), push) in enumerate(zip(state, force, strict=True)):
        bottom = (lane + 1) * height
        rail, middle = bottom - height // 8, width / 2
        draw.line([(0, bottom - 1), (width, bottom - 1)], fill="#dddddd", width=scale)
        draw.line([(0, rail), (width, rail)], fill="#444444", width=scale)
        for limit in (-MAX_POSITION, MAX_POSITION):
            at = middle + limit * metre
            draw.line([(at, rail - 12 * scale), (at, rail + 6 * scale)], fill="#c03030", width=2 * scale)
        cart_x, half, tall = middle + x * metre, 25 * scale, 24 * scale
        draw.rectangle([cart_x - half, rail - tall, cart_x + half, rail - 2 * scale], fill="#303030")
        pivot = (cart_x, rail - tall)
        tip = (
            cart_x + 2 * HALF_LENGTH * metre * math.sin(theta),
            rail - tall - 2 * HALF_LENGTH * metre * math.cos(theta),
        )
        draw.line([pivot, tip], fill="#c98a4b", width=9 * scale)
        draw.ellipse(
            [pivot[0] - 5 * scale, pivot[1] - 5 * scale, pivot[0] + 5 * scale, pivot[1] + 5 * scale], "#8080d0"
        )
        if push:
            side = math.copysign(1, push)
            start, end, y = cart_x + side * half, cart_x + side * (half + 34 * scale), rail - tall / 2
            draw.line([(start, y), (end, y)], fill="#2060c0", width=4 * scale)
            head = [(end + side * 10 * scale, y), (end, y - 8 * scale), (end, y + 8 * scale)]
            draw.polygon(head, fill="#2060c0")
    return np.asarray(image.resize((WIDTH, lanes * LANE_HEIGHT), Image.Resampling.BOX))


def render_poses(env: str, kwargs: dict[str, Any], observations: np.ndarray, size: int = 200) -> np.ndarray | None:
    """The body of a MuJoCo environment in the poses that observations tell of.

    What observations leave out (the root's horizontal position) is 0; joints are kept in their ranges and the body
    above the floor.

    Args:
        env, kwargs: the environment.
        observations: [n, obs], in the environment's units.
        size: of the frames, in pixels.

    Returns:
        uint8 [n, size, size, 3]; None if MuJoCo does not simulate the environment, or observations hold no pose.

    Raises:
        ConfigError: the environment cannot be made, or cannot be drawn on this machine.
    """
    from . import _gymnasium_env, _torchrl_class

    if _torchrl_class(env) is not None:
        return None
    made = _gymnasium_env(env, kwargs)
    try:
        if not hasattr(made.unwrapped, "model") or not hasattr(made.unwrapped, "set_state"):
            return None
        start, _ = made.reset(seed=0)
        qpos_of = _pose_reader(np.asarray(start), made.unwrapped.data.qpos.copy())
    finally:
        made.close()
    if qpos_of is None:
        return None
    made = make_rendered(env, {**kwargs, "width": size, "height": size})
    try:
        body = _Body(made)
        frames = []
        for observation in observations.astype(np.float64):
            body.pose(qpos_of(observation))
            frames.append(made.render())
        return np.stack(frames)
    finally:
        made.close()


def _pose_reader(start: np.ndarray, qpos: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    """How generalised positions follow from an observation: the first way that explains a start state."""

    def without_first(skipped: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda s: np.concatenate([np.zeros(skipped), s[: len(qpos) - skipped]])

    def double_pendulum(s: np.ndarray) -> np.ndarray:
        return np.array([s[0], math.atan2(s[1], s[3]), math.atan2(s[2], s[4])])

    def reacher(s: np.ndarray) -> np.ndarray:
        return np.array([math.atan2(s[2], s[0]), math.atan2(s[3], s[1]), s[4], s[5]])

    ways = [(skipped, without_first(skipped)) for skipped in range(3)] + [(0, double_pendulum), (0, reacher)]
    for skipped, way in ways:
        with contextlib.suppress(IndexError):  # an observation shorter than this way needs
            found = way(start)
            if found.shape == qpos.shape and np.allclose(found[skipped:], qpos[skipped:], atol=1e-5):
                return way
    return None


class _Body:
    """The body of a rendered MuJoCo environment, on a plain floor; the camera follows it if it moves about."""

    def __init__(self, env: gymnasium.Env) -> None:
        import mujoco

        kinds = mujoco.mjtJoint
        self.free, self.slide, self.hinge = int(kinds.mjJNT_FREE), int(kinds.mjJNT_SLIDE), int(kinds.mjJNT_HINGE)
        self.simulator = env.unwrapped
        model, data = self.simulator.model, self.simulator.data
        floor = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        model.geom_matid[floor], model.geom_rgba[floor] = -1, [0.93, 0.93, 0.93, 1]
        model.light_castshadow[:] = False  # software renderers draw the floor's shadow on itself, in black stripes
        self.parts = model.geom_bodyid > 0
        self.height = self._height_index()
        self.follows = model.jnt_type[0] in (self.free, self.slide)
        if not self.follows:
            return
        renderer = self.simulator.mujoco_renderer
        renderer.camera_id, self.camera = -1, renderer.viewer.cam
        if self.height is not None:
            self.camera.azimuth, self.camera.elevation = 90, -30
        places = data.geom_xpos[self.parts]
        reach = np.linalg.norm(places - places.mean(0), axis=1) + model.geom_rbound[self.parts]
        self.camera.distance = 1.25 * reach.max() / math.tan(math.radians(model.vis.global_.fovy / 2))

    def _height_index(self) -> int | None:
        """Where the height of a body that moves about is in qpos."""
        model = self.simulator.model
        for at, kind, axis in zip(model.jnt_qposadr, model.jnt_type, model.jnt_axis, strict=True):
            if kind == self.free:
                return at + 2
            if kind == self.slide and axis[2] == 1:
                return at
        return None

    def pose(self, qpos: np.ndarray) -> None:
        model, data = self.simulator.model, self.simulator.data
        for joint in np.flatnonzero(model.jnt_limited):
            if model.jnt_type[joint] in (self.hinge, self.slide):
                at = model.jnt_qposadr[joint]
                qpos[at] = np.clip(qpos[at], *model.jnt_range[joint])
        still = np.zeros(model.nv)
        self.simulator.set_state(qpos, still)
        lowest = (data.geom_xpos[self.parts, 2] - model.geom_size[self.parts, 0]).min()
        if self.height is not None and lowest < 0:
            qpos[self.height] -= lowest
            self.simulator.set_state(qpos, still)
        if self.follows:
            self.camera.lookat[:] = data.geom_xpos[self.parts].mean(0)
