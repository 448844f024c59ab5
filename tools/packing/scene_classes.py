"""The classes of the sample scenes: their textures, shapes and colours."""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.floating]
Texture = Callable[[Generator, Array, Array], tuple[Array, Array]]
"""(rng, x [H, W], y [H, W] in pixels) -> mix [H, W] of two colours, 0..1; tone [H, W] around 1."""
Shape = Callable[[Generator, Array, Array], Array]
"""(rng, u [H, W], v [H, W] in radii) -> about the distance [H, W] to the outline; inside > 0."""


def noise(rng: Generator, shape: tuple[int, ...], cell_y: float, cell_x: float) -> Array:
    """Smooth noise [H, W] in -1..1 with features of about `cell` pixels."""
    top, down = _lattice(shape[0], cell_y)
    left, across = _lattice(shape[1], cell_x)
    grid = rng.uniform(-1, 1, (top[-1] + 2, left[-1] + 2)).astype(np.float32)
    rows = grid[top] + down[:, None] * (grid[top + 1] - grid[top])
    return rows[:, left] + across * (rows[:, left + 1] - rows[:, left])


def _lattice(count: int, cell: float) -> tuple[NDArray[np.intp], Array]:
    """Of each pixel: the lattice point before it, and a smooth step 0..1 towards the next one.

    Lattice points are `cell` pixels apart.
    """
    position = np.arange(count, dtype=np.float32) / np.float32(cell)
    before = position.astype(np.intp)
    step = position - before.astype(np.float32)
    return before, step * step * (3 - 2 * step)


def soft(value: Array, width: float) -> Array:
    """A step from 0 to 1 at value 0, over a range of `width`."""
    return np.clip(value / np.float32(width) + 0.5, 0, 1)


def _grass(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Thin upright blades over uneven ground."""
    blades = noise(rng, x.shape, rng.uniform(7, 12), 1.4) + noise(rng, x.shape, 4, 1.1)
    ground = noise(rng, x.shape, 30, 30)
    return soft(blades + 0.6 * ground, 1.2), 1 + 0.28 * blades


def _sand(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Grains on long, soft ripples."""
    grain = rng.standard_normal(x.shape, np.float32)
    warp = noise(rng, x.shape, 40, 60)
    ripple = np.sin(y * np.float32(rng.uniform(0.18, 0.3)) + 2.5 * warp)
    return soft(ripple, 3.0), 1 + 0.07 * grain + 0.06 * ripple


def _water(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Flat waves with glints."""
    swell = noise(rng, x.shape, rng.uniform(4, 7), rng.uniform(22, 38))
    chop = noise(rng, x.shape, 2.2, 9)
    glint = soft(swell + 0.7 * chop - 0.75, 0.3)
    return np.maximum(soft(swell, 1.6) * 0.7, glint), 1 + 0.12 * chop + 0.35 * glint


def _brick(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Rows of bricks in different shades, with mortar between them."""
    height = rng.uniform(9, 15)
    length = height * rng.uniform(2.0, 2.6)
    course = np.floor(y / height)
    along = x / length + 0.5 * (course % 2)
    column = np.floor(along)
    edge = np.minimum(_to_edge(y / height) * height, _to_edge(along) * length)
    shade = np.sin(course * 12.9898 + column * 78.233 + rng.uniform(0, 6)).astype(np.float32)
    rough = noise(rng, x.shape, 2, 2)
    return 1 - soft(edge - 1.0, 1.0), 1 + 0.13 * shade + 0.08 * rough


def _sectors(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """A beach ball's wedges."""
    angle = np.arctan2(y, x)
    return soft(np.sin(angle * int(rng.integers(3, 5))), 0.25), np.ones_like(x)


def _planks(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Boards with grain and dark joints."""
    width = rng.uniform(9, 13)
    grain = np.sin(y / width * 14 + 3 * noise(rng, x.shape, 12, 12))
    joint = soft(1.1 - _to_edge(y / width) * width, 1.0)
    return 0.5 + 0.5 * grain, 1 + 0.06 * grain - 0.55 * joint


def _speckles(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Irregular spots."""
    spots = noise(rng, x.shape, 4.5, 4.5)
    return soft(spots - 0.2, 0.25), np.ones_like(x)


def _checks(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """A chessboard."""
    pitch = math.pi / rng.uniform(5.5, 8)
    return soft(np.sin(x * pitch) * np.sin(y * pitch), 0.35), np.ones_like(x)


def _rays(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Fine rays around a disc of the second colour."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    ray = np.sin(angle * int(rng.integers(26, 36)))
    return soft(rng.uniform(7, 10) - radius, 2), 1 + 0.16 * ray


def _scales(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Rows of overlapping round scales."""
    pitch = rng.uniform(6.5, 9)
    row = np.floor(x / pitch)
    across = y / pitch + 0.5 * (row % 2)
    distance = np.hypot(x / pitch - row, across - np.floor(across) - 0.5)
    return soft(distance - 0.75, 0.3), 1.15 - 0.35 * distance


def _veins(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """A middle rib with branches."""
    pitch = rng.uniform(8, 11)
    side = _to_edge((x - 0.9 * np.abs(y)) / pitch) * pitch
    rib = np.minimum(np.abs(y) - 0.6, side)
    return soft(1.2 - rib, 1.2), 1 + 0.05 * side / pitch


def _stripes(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Slanted stripes."""
    pitch = rng.uniform(8, 12)
    return soft(np.sin((x + 0.6 * y) * (2 * np.pi / pitch)), 0.4), np.ones_like(x)


def _to_edge(value: Array) -> Array:
    """Distance to the nearest whole number."""
    return np.abs(value - np.round(value))


def _disc(rng: Generator, u: Array, v: Array) -> Array:
    return 0.85 - np.hypot(u, v)


def _box(rng: Generator, u: Array, v: Array) -> Array:
    return np.minimum(0.8 - np.abs(u), rng.uniform(0.55, 0.8) - np.abs(v))


def _star(rng: Generator, u: Array, v: Array) -> Array:
    points = int(rng.integers(5, 8))
    wave = np.abs(np.mod(np.arctan2(v, u) * (points / math.pi), 2) - 1)
    return 0.5 * (0.42 + 0.58 * wave - np.hypot(u, v))


def _ring(rng: Generator, u: Array, v: Array) -> Array:
    return rng.uniform(0.2, 0.28) - np.abs(np.hypot(u, v) - 0.66)


def _petals(rng: Generator, u: Array, v: Array) -> Array:
    count = int(rng.integers(5, 8))
    return 0.7 * (0.68 + 0.25 * np.cos(np.arctan2(v, u) * count) - np.hypot(u, v))


def _fish(rng: Generator, u: Array, v: Array) -> Array:
    body = 0.4 * (1 - np.hypot((u - 0.2) / 0.78, v / rng.uniform(0.38, 0.5)))
    tail = np.minimum(np.minimum(u + 1.0, -0.3 - u), -0.75 * (u + 0.35) - np.abs(v))
    return np.maximum(body, tail)


def _leaf(rng: Generator, u: Array, v: Array) -> Array:
    bow = rng.uniform(0.6, 1.0)
    return math.hypot(0.95, bow) - np.hypot(u, np.abs(v) + bow)


def _capsule(rng: Generator, u: Array, v: Array) -> Array:
    return rng.uniform(0.24, 0.32) - np.hypot(u - np.clip(u, -0.68, 0.68), v)


@dataclass(frozen=True)
class Kind:
    """The properties that all instances of a semantic class share. Hues are 0..1."""

    name: str
    texture: Texture
    hue: float
    hue_spread: float
    """Standard deviation of an instance's hue."""
    second_hue: float
    """Mean hue of the second colour, relative to the first."""
    contrast: float
    """Brightness of the second colour, relative to the first."""
    shape: Shape | None = None
    """None for a background."""
    home: str = ""
    """The background on which it appears three times as often."""
    round: bool = False
    """Whether it is shaded like a ball."""


BACKGROUNDS = (
    Kind("grass", _grass, 0.27, 0.05, -0.05, 1.25),
    Kind("sand", _sand, 0.11, 0.05, 0.01, 1.15),
    Kind("water", _water, 0.50, 0.09, -0.03, 1.45),
    Kind("brick", _brick, 0.05, 0.07, 0.06, 1.40),
)
OBJECTS = (
    Kind("ball", _sectors, 0.00, 0.20, 0.45, 1.10, _disc, "sand", round=True),
    Kind("crate", _planks, 0.09, 0.07, 0.00, 0.80, _box, "brick"),
    Kind("star", _speckles, 0.14, 0.14, -0.10, 0.65, _star, "sand"),
    Kind("ring", _checks, 0.95, 0.20, 0.50, 1.40, _ring, "water"),
    Kind("flower", _rays, 0.88, 0.14, 0.25, 1.20, _petals, "grass"),
    Kind("fish", _scales, 0.52, 0.18, -0.10, 0.60, _fish, "water"),
    Kind("leaf", _veins, 0.25, 0.10, -0.04, 1.45, _leaf, "grass"),
    Kind("capsule", _stripes, 0.62, 0.22, 0.30, 1.50, _capsule, "brick"),
)
CLASSES = tuple(kind.name for kind in BACKGROUNDS + OBJECTS)


def paint(rng: Generator, kind: Kind, x: Array, y: Array) -> Array:
    """The colours [3, H, W] of an instance, 0..1, before light."""
    hue = rng.normal(kind.hue, kind.hue_spread)
    saturation, value = rng.uniform(0.3, 0.7), rng.uniform(0.42, 0.72)
    first = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    second = colorsys.hsv_to_rgb(
        (hue + rng.normal(kind.second_hue, 0.04)) % 1,
        saturation * rng.uniform(0.6, 1.0),
        min(1, value * kind.contrast * rng.uniform(0.9, 1.1)),
    )
    mix, tone = kind.texture(rng, x, y)
    start, end = np.array([first, second], np.float32)[:, :, None, None]
    return (start + mix * (end - start)) * tone
