"""The file suffixes that packing and evaluation read as images."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm"),
    *(".tif", ".tiff"),
)
