"""Small picture files of every format, mode and orientation that packing and evaluation read."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 40


def shown() -> Image.Image:
    """A smooth picture with four different corners, which shows rotations and reflections."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = np.stack([6 * x, 10 * y, 3 * x + 2 * y], axis=-1)
    return Image.fromarray(channels.astype(np.uint8))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def stored_for(orientation: int) -> Image.Image:
    """The pixels that are shown as `shown()` when they are turned by this orientation."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = shown()
    return image.transpose(inverse[orientation]) if orientation in inverse else image


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with chunks after its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def sixteen() -> np.ndarray:
    """uint16 [H, W] of values whose upper and lower bytes differ."""
    return (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 67 % 65536).astype(np.uint16)


def wide_rgb() -> bytes:
    """A PNG of 16-bit RGB: the upper bytes are those of `shown()`, the lower bytes 255 less."""
    pixels = np.asarray(shown())
    wide = (pixels.astype(">u2") << 8) | (255 - pixels)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in wide)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    )


def files() -> dict[str, bytes]:
    """The bytes of each picture by a name that says what is special about it."""
    image = shown()
    other = Image.fromarray(255 - np.asarray(image))
    palette = image.quantize(32)
    found = {
        "rgb.png": saved(image, "PNG"),
        "alpha.png": saved(image.convert("RGBA"), "PNG"),
        "grey_alpha.png": saved(image.convert("LA"), "PNG"),
        "grey.png": saved(image.convert("L"), "PNG"),
        "one_bit.png": saved(image.convert("1"), "PNG"),
        "palette.png": saved(palette, "PNG"),
        "two_bit.png": saved(image.quantize(4), "PNG", bits=2),
        "transparent_palette.png": saved(palette, "PNG", transparency=0),
        "sixteen.png": saved(Image.fromarray(sixteen()), "PNG"),
        "wide.png": wide_rgb(),
        "animated.png": saved(image, "PNG", save_all=True, append_images=[other]),
        "animated.gif": saved(image, "GIF", save_all=True, append_images=[other]),
        "plain.gif": saved(image, "GIF"),
        "rgb.bmp": saved(image, "BMP"),
        "grey.bmp": saved(image.convert("L"), "BMP"),
        "rgb.ppm": saved(image, "PPM"),
        "sixteen.ppm": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + sixteen().astype(">u2").tobytes(),
        "rgb.tif": saved(image, "TIFF"),
        "deflate.tif": saved(image, "TIFF", compression="tiff_adobe_deflate"),
        "sixteen.tif": saved(Image.fromarray(sixteen()), "TIFF"),
        "cmyk.tif": saved(image.convert("CMYK"), "TIFF"),
        "pages.tif": saved(image, "TIFF", save_all=True, append_images=[other]),
        "rgb.jp2": saved(image, "JPEG2000"),
        "sixteen.jp2": saved(Image.fromarray(sixteen()), "JPEG2000"),
        "rgb.webp": saved(image, "WEBP", lossless=True),
        "alpha.webp": saved(image.convert("RGBA"), "WEBP"),
        "animated.webp": saved(image, "WEBP", save_all=True, append_images=[other]),
        "rgb.avif": saved(image, "AVIF"),
        "rgb.jpg": saved(image, "JPEG", quality=95),
        "fine.jpg": saved(image, "JPEG", quality=95, subsampling=0),
        "grey.jpg": saved(image.convert("L"), "JPEG"),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "two_pictures.jpg": saved(image, "MPO", save_all=True, append_images=[other]),
    }
    forms = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF"}
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 95}}
    for orientation in range(1, 9):
        for suffix, form in forms.items():
            options = {"exif": exif(orientation)} | lossless.get(suffix, {})
            data = saved(stored_for(orientation), form, **options)
            found[f"orientation_{orientation}.{suffix}"] = data
    return found
