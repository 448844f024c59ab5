"""The sample set: generated scenes with a class for every pixel, and photographs of scikit-image.

A scene has one or two textured backgrounds and one to six textured objects, which hide parts of
each other. A light gradient, a colour cast, blur and noise are added. Within a class the shape,
texture, hue, size, direction and light vary. The hues of different classes overlap, so colour alone
does not separate the classes.

    python -m tools.packing.scenes --out sheet.png      a picture of scenes and their label maps
"""

import colorsys
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.parallel import ordered_map
from tools.packing.scene_classes import (
    BACKGROUNDS,
    CLASSES,
    OBJECTS,
    Array,
    Kind,
    noise,
    paint,
    soft,
)
from train.run.cli import CommandParser, run

VAL_START = 1 << 32  # number of the first held-out scene
PHOTOGRAPH_SIDE = 384
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle",
)  # fmt: skip


def scene(seed: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Scene `index`: its image [H, W, 3], and its class map [H, W] with indices into `CLASSES`.

    Sides are 144 to 256 pixels. Depends only on its arguments.
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
    """Fill the canvas [3, H, W] with one background, or with two that meet at an uneven horizon.

    Returns their names.
    """
    height, width = labels.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    upper, lower = (int(index) for index in rng.permutation(len(BACKGROUNDS))[:2])
    labels[:] = lower
    canvas[:] = paint(rng, BACKGROUNDS[lower], x, y)
    if rng.random() < 0.35:
        return {BACKGROUNDS[lower].name}
    horizon = height * rng.uniform(0.3, 0.7) + rng.normal(0, 0.12) * (x - width / 2)
    horizon = horizon + rng.uniform(1, 8) * noise(rng, labels.shape, height, width / 5)
    above = horizon - y
    labels[above > 0] = upper
    _blend(canvas, paint(rng, BACKGROUNDS[upper], x, y), soft(above, 1.5))
    return {BACKGROUNDS[upper].name, BACKGROUNDS[lower].name}


def _place_objects(
    rng: Generator, present: set[str], height: int, width: int
) -> list[tuple[Kind, float, float, float]]:
    """One to six objects (kind, x, y, radius in pixels), from far to near.

    A nearer object is lower in the picture and larger.
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
    patch[:, 3:, 2:] *= 1 - 0.45 * soft(outline[:-3, :-2] + 0.04, 0.2)  # the shadow
    colours = paint(rng, kind, u * radius, v * radius)
    colours *= _shading(rng, kind, columns - x, rows - y, radius)
    _blend(patch, colours, soft(outline * radius, 1.2))
    patch_labels[outline > 0] = len(BACKGROUNDS) + OBJECTS.index(kind)


def _object_frame(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    """Rotate, stretch and bend the object's coordinates [H, W], in radii."""
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.95, 1.2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    cells = max(8.0, u.shape[0] / 3), max(8.0, u.shape[1] / 3)
    bend = 0.07 * noise(rng, u.shape, *cells)
    return (cos * u + sin * v + bend) * stretch, cos * v - sin * u + bend


def _shading(rng: Generator, kind: Kind, x: Array, y: Array, radius: float) -> Array:
    """Light on an object [H, W], around 1: from one side, and darker at the edge of a ball."""
    angle = rng.uniform(0, 2 * np.pi)
    light = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32) / radius
    if not kind.round:
        return 1 + rng.uniform(0.05, 0.2) * light
    return np.clip(1.25 - 0.6 * ((x / radius) ** 2 + (y / radius) ** 2) + 0.25 * light, 0.3, 1.6)


def _blend(canvas: Array, colours: Array, alpha: Array) -> None:
    """Draw `colours` over `canvas` [3, H, W], in place."""
    canvas += alpha * (colours - canvas)


def _photograph(rng: Generator, canvas: Array) -> NDArray[np.uint8]:
    """Turn the canvas [3, H, W] into a photograph [H, W, 3].

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


def _blur(image: Array, sigma: float, axis: int) -> Array:
    """Gaussian blur along one axis, with five taps; sigma in pixels, below 1.

    Written without BLAS: its threads would compete with the caller's threads for the cores.
    """
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2).astype(np.float32)
    taps /= taps.sum()
    count = image.shape[axis]
    total = np.zeros_like(image)
    for offset, tap in zip(range(-2, 3), taps, strict=True):
        total += tap * image.take(np.clip(np.arange(count) + offset, 0, count - 1), axis)
    return total


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """The photographs of scikit-image (name, RGB image), at most PHOTOGRAPH_SIDE pixels."""
    from skimage import data  # only the sample set needs it

    for name in PHOTOGRAPHS:
        loaded = getattr(data, name)()
        pixels = (
            loaded[0] if isinstance(loaded, tuple) else loaded
        )  # of a stereo pair: the left image
        image = Image.fromarray(pixels).convert("RGB")
        image.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE), Image.Resampling.LANCZOS)
        yield name, image


def write(root: Path, count: int, val_count: int, seed: int, workers: int, force: bool) -> None:
    """Write the sample set: {train,val}/{images,labels} and classes.json below `root`.

    Images are JPEG, label maps 8-bit PNG. The folder appears when it is complete. It is not written
    again if an earlier call with the same arguments has written it.

    Raises:
        UserError: if `root` exists and `force` is not set; if `root` is not a sample set; or if it
            cannot be written.
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
_VOID = 255  # ignored by the evaluation


def _has_recipe(root: Path, recipe: str) -> bool:
    path = root / _RECIPE
    try:
        return path.is_file() and path.read_bytes() == recipe.encode()
    except OSError:
        return False


def _check_root(root: Path, force: bool) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not force:
        raise UserError(f"--root {root}: exists; --force replaces it")
    if not (root / "classes.json").is_file():
        raise UserError(f"--root {root}: not a sample set, so it is not replaced")


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
    """Scenes 0, 1, … in a grid of cells of 256 x 256 pixels, each beside its label map."""
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
    """A different hue for each class: pale for backgrounds, vivid for objects."""
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
    parser.add_argument("--columns", type=int, default=3, help="columns of the grid (default 3)")
    parser.add_argument("--rows", type=int, default=4, help="rows of the grid (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator (default 0)")
    args = parser.parse_args(argv)
    try:
        contact_sheet(args.seed, args.columns, args.rows).save(args.out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {args.out}: {error}") from error


if __name__ == "__main__":
    run(main)
