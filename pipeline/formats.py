"""The file suffixes that packing and evaluation read as images, and the formats behind them."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm"),
    *(".tif", ".tiff"),
)
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "PPM", "TIFF")
"""Pillow's names. The suffix does not decide which one a file has. Pillow knows more formats; for
some it runs other programs."""
