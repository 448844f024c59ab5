"""Draw what each prototype stands for: its nearest segments over the images of a beton or a folder.

One row a prototype, the most frequent first: its number, the share of images in which it wins at
least one cell, and its nearest segments with their cosine similarity.
"""

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from evaluation.images import ImageSource, evaluation_size, open_images, spread
from evaluation.networks import default_device, load_network
from evaluation.prototypes import NearestSegments, gather_nearest
from evaluation.segment import Segmenter, assign, segment_images
from pipeline.errors import CommandParser, UserError, check_writable, run
from train.provenance import write_bytes

EXAMPLES = """examples:
  python -m tools.show_prototypes --checkpoint runs/demo --data sample.beton --out prototypes.png
  python -m tools.show_prototypes --checkpoint runs/coco/checkpoints/step_9000 --data val2017 \\
      --out prototypes.png --prototypes 40 --max-images 2000
"""

# Pixels of the picture, which is drawn at twice the size it is looked at.
TILE, GAP, MARGIN, LABEL = 160, 10, 40, 200
CAPTION, BLOCK_GAP = 72, 56
ONE_COLUMN = 6
"""Up to this many prototypes stand in one column, more in two."""

INK, FAINT, PAPER, OUTLINE = "#1b1f24", "#6b7280", "#ffffff", "#ff4d2e"


@dataclass(frozen=True)
class Tile:
    """One drawn segment."""

    picture: Image.Image
    """TILE × TILE pixels."""
    similarity: float


def draw_segment(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A square image uint8 [R, R, 3] with the segment bool [R, R] outlined, the rest dim."""
    image = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
    inside = Image.fromarray(mask).convert("L").resize((TILE, TILE), Image.Resampling.BILINEAR)
    inside = inside.point(lambda value: 255 * (value > 127))
    dimmed = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(0.25)).enhance(0.45)
    drawn = Image.composite(image, dimmed, inside)
    edge = ImageChops.difference(inside, inside.filter(ImageFilter.MinFilter(5)))
    drawn.paste(OUTLINE, mask=edge.filter(ImageFilter.GaussianBlur(0.6)))
    return drawn


def cut_tiles(
    network: Segmenter,
    images: ImageSource,
    nearest: NearestSegments,
    prototypes: np.ndarray,
    size: int,
    device: torch.device,
) -> dict[int, list[Tile]]:
    """The drawn segments of `prototypes` int64 [N], nearest first. Decodes only what is drawn."""
    wanted = nearest.image[prototypes]
    pictures: dict[tuple[int, int], Image.Image] = {}
    needed = np.unique(wanted[wanted >= 0])
    for batch in segment_images(
        network, images, size, indices=needed, device=device, progress="drawing"
    ):
        winner = assign(batch.scores, size).cpu().numpy()
        cells = batch.scores.argmax(dim=1, keepdim=True).float()
        blocks = torch.nn.functional.interpolate(cells, (size, size)).squeeze(1).cpu().numpy()
        for i, number in enumerate(batch.squares.index.tolist()):
            for k in prototypes[(wanted == number).any(axis=1)].tolist():
                mask = winner[i] == k
                # A cell won by a hair may vanish in the upsampled map; its block shows it then.
                mask = mask if mask.any() else blocks[i] == k
                pictures[k, number] = draw_segment(batch.squares.pixels[i], mask)
    return {
        k: [
            Tile(pictures[k, number], similarity)
            for number, similarity in zip(
                nearest.image[k].tolist(), nearest.similarity[k].tolist(), strict=True
            )
            if number >= 0
        ]
        for k in prototypes.tolist()
    }


def draw_picture(nearest: NearestSegments, tiles: dict[int, list[Tile]]) -> Image.Image:
    """The rows of `tiles` below a caption, in one or two columns."""
    columns = 1 if len(tiles) <= ONE_COLUMN else 2
    rows = -(-len(tiles) // columns)
    block = LABEL + nearest.image.shape[1] * (TILE + GAP) - GAP
    width = 2 * MARGIN + columns * block + (columns - 1) * BLOCK_GAP
    height = 2 * MARGIN + CAPTION + rows * (TILE + GAP) - GAP
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    active, total = int((nearest.active > 0).sum()), len(nearest.active)
    caption = (
        f"{len(tiles)} most frequent of {active} active prototypes"
        f" ({total} in all, {nearest.images} images)"
    )
    draw.text((MARGIN, MARGIN - 8), caption, INK, ImageFont.load_default(30))
    for place, (k, row) in enumerate(tiles.items()):
        column, line = divmod(place, rows)
        left = MARGIN + column * (block + BLOCK_GAP)
        top = MARGIN + CAPTION + line * (TILE + GAP)
        draw_row(picture, draw, left, top, (k, nearest.active[k] / nearest.images, row))
    return picture


def draw_row(
    picture: Image.Image,
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    row: tuple[int, float, list[Tile]],
) -> None:
    """One prototype: number, frequency, tiles."""
    number, frequency, tiles = row
    draw.text((left, top + TILE // 2 - 44), f"#{number}", INK, ImageFont.load_default(38))
    label = f"in {frequency:.0%} of images"
    draw.text((left, top + TILE // 2 + 8), label, FAINT, ImageFont.load_default(22))
    for place, tile in enumerate(tiles):
        x = left + LABEL + place * (TILE + GAP)
        picture.paste(tile.picture, (x, top))
        draw.rounded_rectangle((x + 6, top + TILE - 32, x + 62, top + TILE - 6), 6, "#000000")
        corner = (x + 34, top + TILE - 19)
        draw.text(corner, f"{tile.similarity:.2f}", PAPER, ImageFont.load_default(20), anchor="mm")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m tools.show_prototypes",
        description=__doc__,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder, or one of its checkpoints"
    )
    parser.add_argument("--data", type=Path, required=True, help="a beton, or a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write (.png)")
    parser.add_argument("--top", type=int, default=5, help="segments for each prototype (5)")
    parser.add_argument("--prototypes", type=int, default=20, help="prototypes to draw (20)")
    parser.add_argument("--max-images", type=int, help="look at this many images (all)")
    parser.add_argument(
        "--size", type=int, help="side of the segmented square in pixels (320 for 224-pixel views)"
    )
    parser.add_argument("--batch", type=int, default=8, help="images segmented at once (8)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    for name in ("top", "prototypes", "max_images", "size", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.out.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"--out {args.out}: must end in .png, .jpg or .webp")
    check_writable("--out", args.out)
    images = open_images(args.data)
    device = default_device()
    network, config = load_network(args.checkpoint, device)
    size = args.size or evaluation_size(config.views.size)
    batches = segment_images(
        network,
        images,
        size,
        indices=spread(len(images), args.max_images),
        device=device,
        batch_size=args.batch,
        progress="segmenting",
    )
    nearest = gather_nearest(batches, args.top)
    shown = nearest.by_frequency()[: args.prototypes]
    tiles = cut_tiles(network, images, nearest, shown, size, device)
    stream = io.BytesIO()
    draw_picture(nearest, tiles).save(
        stream, Image.registered_extensions()[args.out.suffix.lower()]
    )
    write_bytes(args.out, stream.getvalue())
    print(f"wrote {args.out}: {len(shown)} of {len(nearest.active)} prototypes")


if __name__ == "__main__":
    run(main)
