"""The embedded sample set: scenes with a class for every pixel, and photographs from scikit-image.

A scene is one or two textured backgrounds and one to six textured objects that hide parts of each
other, under a light gradient, a colour cast, blur and noise. Within a class shape, texture, hue,
size, direction and light vary; the hues of different classes overlap, so that colour alone does
not tell them apart.

    python -m tools.packing.scenes --out sheet.png      a picture of scenes and their label maps
"""

import colorsys
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.parallel import ordered_map
from train.run.cli import CommandParser, run

Array = NDArray[np.floating]
Texture = Callable[[Generator, Array, Array], tuple[Array, Array]]
"""(rng, x [H, W], y [H, W] in pixels) -> mix [H, W] of two colours, 0..1; tone [H, W] around 1."""
Shape = Callable[[Generator, Array, Array], Array]
"""(rng, u [H, W], v [H, W] in radii) -> about the distance [H, W] to the outline, inside > 0."""

VAL_START = 1 << 32  # held-out scenes are numbered from here
PHOTOGRAPH_SIDE = 384
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Noise
# -------------------------------------------------------------------------------------------------


def _noise(rng: Generator, shape: tuple[int, ...], cell_y: float, cell_x: float) -> Array:
    """Smooth noise [H, W] in -1..1 whose features are about `cell` pixels large."""
    top, down = _lattice(shape[0], cell_y)
    left, across = _lattice(shape[1], cell_x)
    grid = rng.uniform(-1, 1, (top[-1] + 2, left[-1] + 2)).astype(np.float32)
    rows = grid[top] + down[:, None] * (grid[top + 1] - grid[top])
    return rows[:, left] + across * (rows[:, left + 1] - rows[:, left])


def _lattice(count: int, cell: float) -> tuple[NDArray[np.intp], Array]:
    """For each pixel the lattice point before it, `cell` pixels apart, and the step to the next."""
    position = np.arange(count, dtype=np.float32) / np.float32(cell)
    before = position.astype(np.intp)
    step = position - before.astype(np.float32)
    return before, step * step * (3 - 2 * step)


def _blur(image: Array, sigma: float, axis: int) -> Array:
    """Gaussian blur along one axis, with five taps; sigma in pixels, below 1.

    By hand, for BLAS threads and those of the caller would fight over the cores.
    """
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    count = image.shape[axis]
    total = np.zeros_like(image)
    for offset, tap in zip(range(-2, 3), taps, strict=True):
        total += tap * image.take(np.clip(np.arange(count) + offset, 0, count - 1), axis)
    return total


def _soft(value: Array, width: float) -> Array:
    """A step at 0, `width` wide."""
    return np.clip(value / np.float32(width) + 0.5, 0, 1)


# -------------------------------------------------------------------------------------------------
# Textures
# -------------------------------------------------------------------------------------------------


def _grass(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Thin upright blades over uneven ground."""
    blades = _noise(rng, x.shape, rng.uniform(7, 12), 1.4) + _noise(rng, x.shape, 4, 1.1)
    ground = _noise(rng, x.shape, 30, 30)
    return _soft(blades + 0.6 * ground, 1.2), 1 + 0.28 * blades


def _sand(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Grains on long, soft ripples."""
    grain = rng.standard_normal(x.shape, np.float32)
    warp = _noise(rng, x.shape, 40, 60)
    ripple = np.sin(y * np.float32(rng.uniform(0.18, 0.3)) + 2.5 * warp)
    return _soft(ripple, 3.0), 1 + 0.07 * grain + 0.06 * ripple


def _water(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Flat waves with glints."""
    swell = _noise(rng, x.shape, rng.uniform(4, 7), rng.uniform(22, 38))
    chop = _noise(rng, x.shape, 2.2, 9)
    glint = _soft(swell + 0.7 * chop - 0.75, 0.3)
    return np.maximum(_soft(swell, 1.6) * 0.7, glint), 1 + 0.12 * chop + 0.35 * glint


def _brick(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Courses of bricks, each of its own shade, with mortar between them."""
    height = rng.uniform(9, 15)
    length = height * rng.uniform(2.0, 2.6)
    course = np.floor(y / height)
    along = x / length + 0.5 * (course % 2)
    column = np.floor(along)
    edge = np.minimum(_to_edge(y / height) * height, _to_edge(along) * length)
    shade = np.sin(course * 12.9898 + column * 78.233 + rng.uniform(0, 6)).astype(np.float32)
    rough = _noise(rng, x.shape, 2, 2)
    return 1 - _soft(edge - 1.0, 1.0), 1 + 0.13 * shade + 0.08 * rough


def _sectors(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """A beach ball's wedges."""
    angle = np.arctan2(y, x)
    return _soft(np.sin(angle * int(rng.integers(3, 5))), 0.25), np.ones_like(x)


def _planks(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Boards with grain, and dark joints between them."""
    width = rng.uniform(9, 13)
    grain = np.sin(y / width * 14 + 3 * _noise(rng, x.shape, 12, 12))
    joint = _soft(1.1 - _to_edge(y / width) * width, 1.0)
    return 0.5 + 0.5 * grain, 1 + 0.06 * grain - 0.55 * joint


def _speckles(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Irregular spots."""
    spots = _noise(rng, x.shape, 4.5, 4.5)
    return _soft(spots - 0.2, 0.25), np.ones_like(x)


def _checks(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """A chessboard."""
    pitch = math.pi / rng.uniform(5.5, 8)
    return _soft(np.sin(x * pitch) * np.sin(y * pitch), 0.35), np.ones_like(x)


def _rays(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Fine rays around a disc of the second colour."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    ray = np.sin(angle * int(rng.integers(26, 36)))
    return _soft(rng.uniform(7, 10) - radius, 2), 1 + 0.16 * ray


def _scales(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Rows of overlapping round scales."""
    pitch = rng.uniform(6.5, 9)
    row = np.floor(x / pitch)
    across = y / pitch + 0.5 * (row % 2)
    distance = np.hypot(x / pitch - row, across - np.floor(across) - 0.5)
    return _soft(distance - 0.75, 0.3), 1.15 - 0.35 * distance


def _veins(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """A middle rib with ribs branching off."""
    pitch = rng.uniform(8, 11)
    side = _to_edge((x - 0.9 * np.abs(y)) / pitch) * pitch
    rib = np.minimum(np.abs(y) - 0.6, side)
    return _soft(1.2 - rib, 1.2), 1 + 0.05 * side / pitch


def _stripes(rng: Generator, x: Array, y: Array) -> tuple[Array, Array]:
    """Slanted stripes."""
    pitch = rng.uniform(8, 12)
    return _soft(np.sin((x + 0.6 * y) * (2 * np.pi / pitch)), 0.4), np.ones_like(x)


def _to_edge(value: Array) -> Array:
    """Distance to the nearest whole number."""
    return np.abs(value - np.round(value))


# -------------------------------------------------------------------------------------------------
# Shapes
# -------------------------------------------------------------------------------------------------


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


# -------------------------------------------------------------------------------------------------
# Classes
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A semantic class: what all its instances share. Hues in turns."""

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
    """The background on which it is three times as likely."""
    round: bool = False
    """Shaded like a ball."""


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


def _paint(rng: Generator, kind: Kind, x: Array, y: Array) -> Array:
    """An instance's colours [3, H, W] in 0..1, before light."""
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


# -------------------------------------------------------------------------------------------------
# Scenes
# -------------------------------------------------------------------------------------------------


def scene(seed: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scene `index`: the image [H, W, 3] and its class map [H, W] of positions in `CLASSES`.

    Sides are 144 to 256 pixels. A function of its arguments alone.
    """
    rng = Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    sides = int(rng.integers(144, 193)), int(rng.integers(192, 257))
    height, width = sides if rng.random() < 0.6 else sides[::-1]
    canvas = np.empty((3, height, width), np.float32)
    labels = np.empty((height, width), np.uint8)
    present = _draw_backgrounds(rng, canvas, labels)
    for kind, x, y, radius in _place_objects(rng, present, height, width):
        _draw_object(rng, canvas, labels, kind, x, y, radius)
    return _photograph(rng, canvas), labels


def _draw_backgrounds(rng: Generator, canvas: Array, labels: NDArray[np.uint8]) -> set[str]:
    """Fill the canvas [3, H, W] with one background, or two that meet at an uneven horizon.

    Returns their names.
    """
    height, width = labels.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    upper, lower = (int(index) for index in rng.permutation(len(BACKGROUNDS))[:2])
    labels[:] = lower
    canvas[:] = _paint(rng, BACKGROUNDS[lower], x, y)
    if rng.random() < 0.35:
        return {BACKGROUNDS[lower].name}
    horizon = height * rng.uniform(0.3, 0.7) + rng.normal(0, 0.12) * (x - width / 2)
    horizon = horizon + rng.uniform(1, 8) * _noise(rng, labels.shape, height, width / 5)
    above = horizon - y
    labels[above > 0] = upper
    _blend(canvas, _paint(rng, BACKGROUNDS[upper], x, y), _soft(above, 1.5))
    return {BACKGROUNDS[upper].name, BACKGROUNDS[lower].name}


def _place_objects(
    rng: Generator, present: set[str], height: int, width: int
) -> list[tuple[Kind, float, float, float]]:
    """One to six objects (kind, x, y, radius in pixels), from far to near.

    The nearer an object, the lower and larger it is.
    """
    weights = np.array([3.0 if kind.home in present else 1.0 for kind in OBJECTS])
    kinds = rng.choice(len(OBJECTS), size=rng.integers(1, 7), p=weights / weights.sum())
    centres = np.sort(rng.uniform(0.1, 0.92, len(kinds)))
    return [
        (
            OBJECTS[kind],
            rng.uniform(0.05, 0.95) * width,
            centre * height,
            min(height, width) * rng.uniform(0.16, 0.28) * (0.8 + 0.5 * centre),
        )
        for kind, centre in zip(kinds, centres, strict=True)
    ]


def _draw_object(
    rng: Generator,
    canvas: Array,
    labels: NDArray[np.uint8],
    kind: Kind,
    x: float,
    y: float,
    radius: float,
) -> None:
    """Draw one object with its shadow onto the canvas [3, H, W], and its class into `labels`."""
    height, width = labels.shape
    reach = 1.25 * radius
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    patch, patch_labels = canvas[:, top:bottom, left:right], labels[top:bottom, left:right]
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    u, v = _object_frame(rng, (columns - x) / radius, (rows - y) / radius)

    assert kind.shape is not None
    outline = kind.shape(rng, u, v)
    patch[:, 3:, 2:] *= 1 - 0.45 * _soft(outline[:-3, :-2] + 0.04, 0.2)  # the shadow
    colours = _paint(rng, kind, u * radius, v * radius)
    colours *= _shading(rng, kind, columns - x, rows - y, radius)
    _blend(patch, colours, _soft(outline * radius, 1.2))
    patch_labels[outline > 0] = len(BACKGROUNDS) + OBJECTS.index(kind)


def _object_frame(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    """Turn, stretch and bend the object's coordinates [H, W]; in radii."""
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.95, 1.2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    cells = max(8.0, u.shape[0] / 3), max(8.0, u.shape[1] / 3)
    bend = 0.07 * _noise(rng, u.shape, *cells)
    return (cos * u + sin * v + bend) * stretch, cos * v - sin * u + bend


def _shading(rng: Generator, kind: Kind, x: Array, y: Array, radius: float) -> Array:
    """Light on an object [H, W], around 1: from a side, and darker towards the rim of a ball."""
    angle = rng.uniform(0, 2 * np.pi)
    light = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32) / radius
    if not kind.round:
        return 1 + rng.uniform(0.05, 0.2) * light
    return np.clip(1.25 - 0.6 * ((x / radius) ** 2 + (y / radius) ** 2) + 0.25 * light, 0.3, 1.6)


def _blend(canvas: Array, colours: Array, alpha: Array) -> None:
    """Draw `colours` over `canvas` [3, H, W], in place."""
    canvas += alpha * (colours - canvas)


def _photograph(rng: Generator, canvas: Array) -> NDArray[np.uint8]:
    """What a camera makes of the canvas [3, H, W], as [H, W, 3].

    Light gradient, colour cast, blur, tone curve, noise.
    """
    height, width = canvas.shape[1:]
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    down = np.linspace(-fall * np.sin(angle), fall * np.sin(angle), height, dtype=np.float32)
    across = np.linspace(-fall * np.cos(angle), fall * np.cos(angle), width, dtype=np.float32)
    cast = rng.uniform(0.9, 1.1, 3) * rng.uniform(0.75, 1.1)
    image = canvas * cast.astype(np.float32)[:, None, None]
    image *= 1 + down[:, None] + across
    sigma = rng.uniform(0.3, 0.9)
    image = np.clip(_blur(_blur(image, sigma, 1), sigma, 2), 0, 1)
    image *= 1 + np.float32(rng.uniform(-0.15, 0.25)) * (1 - image)
    image += np.float32(rng.uniform(0.005, 0.03)) * rng.standard_normal(image.shape, np.float32)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


# -------------------------------------------------------------------------------------------------
# Files
# -------------------------------------------------------------------------------------------------


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """The photographs in scikit-image's wheel (name, RGB), at most PHOTOGRAPH_SIDE pixels."""
    from skimage import data  # only the sample set needs it

    for name in PHOTOGRAPHS:
        loaded = getattr(data, name)()
        pixels = loaded[0] if isinstance(loaded, tuple) else loaded  # a stereo pair: its left eye
        image = Image.fromarray(pixels).convert("RGB")
        image.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
        yield name, image


def write(root: Path, count: int, val_count: int, seed: int, workers: int, force: bool) -> None:
    """Write the sample set: {train,val}/{images,labels} and classes.json below `root`.

    Images are JPEG, label maps 8-bit PNG. The folder appears when it is complete; where it is there
    already, made by an earlier call of the same arguments, nothing is done.

    Raises:
        UserError: where `root` is something else and `force` is not set, or it is no sample set,
            or it cannot be written.
    """
    recipe = json.dumps({"count": count, "val_count": val_count, "seed": seed}) + "\n"
    if not force and _has_recipe(root, recipe):
        return
    _check_root(root, force)
    partial = root.with_name(root.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write_split(partial / "train", seed, range(count), workers)
        _write_split(partial / "val", seed, range(VAL_START, VAL_START + val_count), workers)
        for name, image in photographs():
            _save_jpeg(image, partial / "train" / "images" / f"photo_{name}.jpg")
            void = Image.new("L", image.size, _VOID)
            void.save(partial / "train" / "labels" / f"photo_{name}.png")
        (partial / "classes.json").write_text(json.dumps(CLASSES, indent=1) + "\n")
        (partial / _RECIPE).write_text(recipe)
        if root.exists():
            shutil.rmtree(root)
        partial.replace(root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_RECIPE = "recipe.json"
_VOID = 255  # what evaluation leaves out


def _has_recipe(root: Path, recipe: str) -> bool:
    try:
        return (root / _RECIPE).read_text() == recipe
    except OSError:
        return False


def _check_root(root: Path, force: bool) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not force:
        raise UserError(f"--root {root}: exists; --force replaces it")
    if not (root / "classes.json").is_file():
        raise UserError(f"--root {root}: is not a sample set, so it is not replaced")


def _write_split(folder: Path, seed: int, indices: range, workers: int) -> None:
    """Write scenes `indices` as NNNNNN.jpg and NNNNNN.png, numbered from 0."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()

    def write_one(index: int) -> None:
        image, labels = scene(seed, index)
        name = f"{index - indices.start:06d}"
        _save_jpeg(Image.fromarray(image), folder / "images" / f"{name}.jpg")
        Image.fromarray(labels).save(folder / "labels" / f"{name}.png")

    written = ordered_map(write_one, indices, workers)
    for _ in tqdm(written, f"{folder.name} scenes", len(indices), unit="img", disable=None):
        pass


def _save_jpeg(image: Image.Image, path: Path) -> None:
    image.save(path, quality=95, subsampling="4:2:0")


def contact_sheet(seed: int, columns: int, rows: int) -> Image.Image:
    """Scenes 0, 1, … in a grid, each beside its label map, in cells of 256 x 256 pixels."""
    palette = (np.array([_label_colour(label) for label in range(len(CLASSES))]) * 255).astype(
        np.uint8
    )
    sheet = Image.new("RGB", (columns * 512, rows * 256), "white")
    for index in range(columns * rows):
        image, labels = scene(seed, index)
        for side, pixels in enumerate((image, palette[labels])):
            offset = (256 - pixels.shape[1]) // 2, (256 - pixels.shape[0]) // 2
            corner = (index % columns * 512 + side * 256, index // columns * 256)
            sheet.paste(Image.fromarray(pixels), (corner[0] + offset[0], corner[1] + offset[1]))
    return sheet


def _label_colour(label: int) -> tuple[float, float, float]:
    """Backgrounds pale, objects vivid, each with its own hue."""
    if label < len(BACKGROUNDS):
        return colorsys.hsv_to_rgb(0.12 + label / len(BACKGROUNDS), 0.2, 0.85)
    return colorsys.hsv_to_rgb(label / len(OBJECTS), 0.8, 0.6 + 0.3 * (label % 2))


def main(argv: Sequence[str] | None = None) -> None:
    """Write a contact sheet."""
    parser = CommandParser(
        prog="python -m tools.packing.scenes",
        description="Write a picture of generated scenes and their label maps.",
        epilog="example:\n  python -m tools.packing.scenes --columns 3 --rows 4 --out sheet.png",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument("--columns", type=int, default=3, help="of the grid (default 3)")
    parser.add_argument("--rows", type=int, default=4, help="of the grid (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the generator (default 0)")
    args = parser.parse_args(argv)
    try:
        contact_sheet(args.seed, args.columns, args.rows).save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out}: {error}") from error


if __name__ == "__main__":
    run(main)
