"""The images that slotstream reads: suffixes of their files, formats behind them, largest size."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm"),
    *(".tif", ".tiff"),
)
ARCHIVE_SUFFIXES = (".tar", ".zip")
"""Of archives that packing reads in place."""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "PPM", "TIFF")
"""Pillow's names. The suffix does not decide which one a file has. Pillow knows more formats; for
some it runs other programs."""
MAX_PIXELS = 178_956_970
"""Height times width: Pillow's limit for decompression bombs. Larger images are not packed, and a
damaged size must not cause an allocation of gigabytes."""
