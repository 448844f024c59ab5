"""Segments whole images and writes their masks; `evaluation.masks` is the command.

Letters: B images, K segments, H W pixels of an image, h w cells.
"""

import argparse
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluation.clusters import kmeans_clusters, merged_prototypes, prototype_clusters
from evaluation.commands import side_for
from evaluation.crf import require_crf
from evaluation.datasets.images import (
    DECODE_THREADS,
    STRIDE,
    ImageSource,
    NamedImages,
    open_images,
)
from evaluation.datasets.squares import SquareImages, normalise
from evaluation.features import dilated
from evaluation.merging import merge_prototypes
from evaluation.networks import default_device, load_network
from evaluation.pictures.drawing import distinct
from evaluation.reduction import require_cells
from evaluation.scoring import Predictor
from evaluation.segment import assign
from evaluation.specs import open_all
from pipeline.errors import UserError, printable
from train.run.provenance import new_folder, provenance, write_json

PALETTE = 256
"""Values of a PNG with a palette; more segments are 16-bit grey values."""
LONGEST = 16
"""Times the shorter side: a longer image is squeezed."""
AHEAD = 8
"""Images that are read while earlier ones are segmented."""
OF_A_RUN = {"upsample": "scores", "crf_temperature": None}
OF_KMEANS = {"kmeans": "greedy", "restarts": 1, "standardise": None, "pca": None}
"""Options of the evaluation that are fixed here."""


def write_masks(args: argparse.Namespace) -> None:
    """Write the folder that the options describe. Raises UserError."""
    if args.crf:
        require_crf()
    images = open_images(args.data)
    files = mask_names(images.names())
    size = args.size or side_for(args.checkpoint)
    predictor, count = open_predictor(args, images, size)
    colours, pixels = distinct(count), np.zeros(count, np.int64)
    with new_folder(args.out) as folder:
        for file, mask in zip(files, masks(predictor, images, size, args.crf), strict=True):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(mask, colours))
            pixels += np.bincount(mask.ravel(), minlength=count)
        segments = [
            {"value": k, "colour": colours[k].tolist(), "share": pixels[k] / pixels.sum()}
            for k in range(count)
        ]
        content = {"kind": predictor.kind, "made": predictor.made, "size": size, "crf": args.crf}
        write_json(folder / "segments.json", provenance() | content | {"segments": segments})
    used = f"{int((pixels > 0).sum())} of {count} segments in use"
    print(f"wrote {args.out}: {len(files):,} masks, {used} ({predictor.kind})")


def open_predictor(
    args: argparse.Namespace, images: NamedImages, size: int
) -> tuple[Predictor, int]:
    """What segments the images, and its number of segments. Raises UserError."""
    vars(args).update(OF_A_RUN)
    squares = SquareImages(images, size, default_device())
    if args.clusters is not None:
        vars(args).update(OF_KMEANS, seeds=[args.seed or 0])
        (features,) = open_all(args, squares)
        first = features(squares.first().normalised(squares.device))
        require_cells(features.name, first, len(images), whiten=None, clusters=args.clusters)
        return kmeans_clusters(features, squares, args.clusters, args), args.clusters
    network, config = load_network(args.checkpoint, squares.device)
    if args.output_stride is not None:
        network.teacher.encoder = dilated(network.teacher.encoder, args.output_stride)
    count = config.model.num_prototypes
    if args.merge is None:
        return prototype_clusters("trained", network, config, args), count
    if args.merge > count:
        raise UserError(f"--merge {args.merge}: {args.checkpoint} has {count} prototypes")
    unlabelled = open_images(args.unlabelled) if args.unlabelled else images
    groups = merge_prototypes(network, config, unlabelled, args.merge, squares.device)
    return merged_prototypes("trained", network, groups, config, args), args.merge


def masks(predictor: Predictor, images: ImageSource, size: int, crf: bool) -> Iterator[np.ndarray]:
    """The segment of each pixel of each image, int64 [H, W], in order."""
    device = default_device()
    for (height, width), pixels in scaled_images(images, size):
        with torch.inference_mode():
            (logits,) = predictor.logits(normalise(torch.from_numpy(pixels)[None].to(device)))
        clusters = assign(logits.float(), (pixels.shape[0], pixels.shape[1]))
        if crf:
            clusters = predictor.refine(logits.float(), clusters, pixels[None])
        found = Image.fromarray(clusters[0].cpu().numpy().astype(np.int32))
        yield np.asarray(found.resize((width, height), Image.Resampling.NEAREST))


def scaled_images(images: ImageSource, size: int) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Stored (height, width) of each image, and its pixels uint8 [H, W, 3], scaled until the
    shorter side is `size` and the longer one a multiple of a cell.
    """

    def load(i: int) -> tuple[tuple[int, int], np.ndarray]:
        pixels = images.load(i)
        height, width = pixels.shape[:2]
        scale = size / min(height, width)
        target = [scaled_side(side * scale, size) for side in (width, height)]
        image = Image.fromarray(pixels).resize((target[0], target[1]), Image.Resampling.BILINEAR)
        return (height, width), np.array(image)

    bar = tqdm(total=len(images), desc="segmenting", unit="image")
    with bar, ThreadPoolExecutor(DECODE_THREADS) as pool:
        for start in range(0, len(images), AHEAD):
            for scaled in pool.map(load, range(start, min(start + AHEAD, len(images)))):
                yield scaled
                bar.update()


def scaled_side(side: float, size: int) -> int:
    """`size` for the shorter side; for the other one whole cells, at most `LONGEST` times it."""
    cells = round(min(side, LONGEST * size) / STRIDE)
    return size if round(side) == size else max(size, STRIDE * cells)


def mask_names(names: Sequence[str]) -> list[Path]:
    """The file of each image's mask: its name with .png in place of the suffix, or after it where
    two images differ by the suffix alone. No name leads out of a folder. Raises UserError if an
    image is named twice, or a mask has the name of a folder.
    """
    inside = [
        PurePosixPath(
            *("__" if part == ".." else part for part in PurePosixPath(name).parts if part != "/")
        )
        for name in names
    ]
    stems = Counter(path.with_suffix("") for path in inside)
    found = [
        Path(path.with_suffix(".png") if stems[path.with_suffix("")] == 1 else f"{path}.png")
        for path in inside
    ]
    twice = next((file for file, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{printable(str(twice))}: two images would have this mask")
    folders = {folder for file in found for folder in file.parents}
    if both := next((file for file in found if file in folders), None):
        raise UserError(f"{printable(str(both))}: an image's mask, and a folder of other masks")
    return found


def png(mask: np.ndarray, colours: np.ndarray) -> bytes:
    """A mask int [H, W] as PNG: values of a palette uint8 [K, 3], or 16-bit grey if K > 256."""
    if len(colours) <= PALETTE:
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette(colours.ravel().tolist())
    else:
        picture = Image.fromarray(mask.astype(np.uint16))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
