"""The ids that a PNG stores, whatever its colour type and bit depth.

Programs store the same label map in many ways. A pixel has up to two values: the number in the
file (its index into a palette, or the bits of a 1-, 2- or 4-bit grey), and the grey that a viewer
shows. They differ where a program has made a file of 8-bit greys smaller, and where it has spread
the ids of a small one over black to white.

Letters: H W the image's height and width, in pixels.
"""

import numpy as np
from PIL import Image

from pipeline.errors import BadImage

REMEDY = "store the ids as 8-bit grey"
_SIXTEEN = 257  # a program that turns 8-bit greys into 16-bit greys multiplies by it
_GREYS, _COLOURS = ("1", "L", "I;16", "I"), ("LA", "RGB", "RGBA")
MODES = frozenset((*_GREYS, "P", *_COLOURS))
"""PIL modes of a PNG."""


def has_channels(image: Image.Image) -> bool:
    """Whether only the pixels can say if the image holds ids: it has several channels."""
    return image.mode in _COLOURS


def ids_of(
    image: Image.Image, bits: int, known: np.ndarray, colours: np.ndarray | None = None
) -> np.ndarray:
    """The ids as uint8, uint16 or int32 [H, W].

    Args:
        bits: of a channel, as the file stores it.
        known: bool [256], the ids that the data set defines. They decide between two readings.
        colours: uint8 [256, 3], the data set's official colour of each id. It says what the colours
            of a picture or a palette mean, if all are there.

    Raises:
        BadImage: if the pixels are no ids, or if they can mean two different label maps.
    """
    pixels = np.asarray(image)
    if image.mode == "P":
        return _from_palette(pixels, image, known, colours)
    if image.mode in _COLOURS:
        return _from_channels(pixels, image.mode, bits, colours)
    if bits < 8:
        steps = (1 << bits) - 1
        greys = np.arange(steps + 1) * (255 // steps)
        stored = pixels.astype(np.uint8)
        if image.mode == "L":  # Pillow has spread the greys
            stored //= 255 // steps
        return _decided(stored, greys.astype(np.uint8), known, f"{bits}-bit grey")
    if bits == 16 and pixels.max() >= len(known):
        narrow, rest = np.divmod(pixels, _SIXTEEN)
        if not rest.any() and known[narrow].all():
            return narrow
    return pixels


def voc_colours() -> np.ndarray:
    """uint8 [256, 3]: VOC's colour of each id. Bit 7 - i of red is bit 3 i of the id; green and
    blue take the next bits.
    """
    ids, shifts = np.arange(256), np.arange(8)
    channels = [(((ids[:, None] >> (3 * shifts + c)) & 1) << (7 - shifts)).sum(1) for c in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def palette_of(image: Image.Image) -> np.ndarray:
    """uint8 [n, 3], the colours of a palette image."""
    return np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)


def _from_palette(
    pixels: np.ndarray, image: Image.Image, known: np.ndarray, colours: np.ndarray | None
) -> np.ndarray:
    palette = palette_of(image)
    if pixels.max() >= len(palette):
        return pixels  # the others have no colour
    if colours is not None and len(np.unique(palette, axis=0)) == len(palette):
        ids = _by_colour(palette[pixels], colours)
        if ids is not None:
            return ids
    if (palette != palette[:, :1]).any():
        return pixels
    return _decided(pixels, palette[:, 0], known, "a palette of greys")


def _from_channels(
    pixels: np.ndarray, mode: str, bits: int, colours: np.ndarray | None
) -> np.ndarray:
    if bits == 16:
        raise BadImage(f"not a label map: its pixels are 16-bit {mode}: {REMEDY}")
    if mode.endswith("A"):
        if (pixels[..., -1] != 255).any():
            raise BadImage(f"not a label map: it is partly transparent: {REMEDY}")
        pixels = pixels[..., :-1]
    if colours is not None and pixels.shape[2] == 3:
        ids = _by_colour(pixels, colours)
        if ids is not None:
            return ids
    if (pixels != pixels[..., :1]).any():
        raise BadImage(f"not a label map: its pixels are {mode} colours, not class ids: {REMEDY}")
    return pixels[..., 0]


def _by_colour(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray | None:
    """The ids [H, W] of colours [H, W, 3]; None if one of them has no id."""
    weights = np.array([1 << 16, 1 << 8, 1])
    numbers = colours @ weights
    order = np.argsort(numbers)
    wanted = pixels @ weights
    place = np.searchsorted(numbers[order], wanted).clip(max=len(order) - 1)
    ids: np.ndarray = order[place].astype(np.uint8)
    return ids if (numbers[ids] == wanted).all() else None


def _decided(stored: np.ndarray, greys: np.ndarray, known: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in the file, or the greys that they show.

    Greys at equal distances from black to white are made by programs that store small ids, or
    chosen by optimisers for greys that happen to fit: the table of classes decides. Other greys are
    ids, because only an optimiser makes such a palette.
    """
    used = np.flatnonzero(np.bincount(stored.ravel(), minlength=len(greys)))
    shown = greys[used]
    if (shown == used).all() or len(set(shown.tolist())) < len(used):
        return stored
    if not any(_spread(palette) for palette in (greys, greys[: used[-1] + 1])):
        return greys[stored]
    if known[used].all() and known[shown].all():
        raise BadImage(
            f"{kind}, which can mean the ids {_listed(used)} or {_listed(shown)}: {REMEDY}"
        )
    return greys[stored] if known[shown].all() else stored


def _spread(greys: np.ndarray) -> bool:
    """Whether these are greys at equal distances from black to white, or from white to black."""
    even = np.linspace(0, 255, len(greys))
    return len(greys) > 1 and any(np.abs(greys - line).max() < 1 for line in (even, even[::-1]))


def _listed(ids: np.ndarray) -> str:
    return " ".join(map(str, ids[:4].tolist())) + " …" * (len(ids) > 4)
