"""Which files are taken for images, by packing and by evaluation alike."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ppm"),
    *(".tif", ".tiff"),
)
