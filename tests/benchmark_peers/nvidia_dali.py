"""A plain DALI pipeline. Decoding is on the GPU if there is one ("mixed"), and so is the rest."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from tests.benchmark_peers.peers import Job, Views

LEVELS = 255
ONE, HALF, WHITE = (types.Constant(level, types.UINT8) for level in (1, 128, LEVELS))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_views(job: Job) -> Views:
    on_gpu = job.device == "cuda"
    files = sorted(str(path) for path in Path(job.files).iterdir())
    pipe = _pipeline(
        files,
        job.recipe,
        "mixed" if on_gpu else "cpu",
        batch_size=job.batch,
        num_threads=job.threads,
        device_id=0 if on_gpu else None,
    )
    names = ["first", "second"]
    batches = DALIGenericIterator(pipe, names, last_batch_policy=LastBatchPolicy.FILL)
    for ((batch),) in batches:
        yield batch["first"], batch["second"]


@pipeline_def(enable_conditionals=True)
def _pipeline(files: list[str], recipe: SimpleNamespace, device: str) -> Any:
    jpegs, _ = fn.readers.file(files=files, random_shuffle=True)
    images = fn.decoders.image(jpegs, device=device, output_type=types.RGB)
    return _view(images, recipe, 0), _view(images, recipe, 1)


def _view(images: Any, recipe: SimpleNamespace, v: int) -> Any:
    x = fn.random_resized_crop(
        images,
        size=recipe.size,
        random_area=[recipe.min_scale, recipe.max_scale],
        random_aspect_ratio=[recipe.min_aspect, recipe.max_aspect],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    jittered = fn.random.coin_flip(probability=recipe.jitter)
    coloured = 1 - fn.random.coin_flip(probability=recipe.grey)
    x = fn.color_twist(
        x,
        brightness=_factor(recipe.brightness, jittered),
        contrast=_factor(recipe.contrast, jittered),
        saturation=_factor(recipe.saturation, jittered) * coloured,
        hue=jittered * fn.random.uniform(range=_around(0, 360 * recipe.hue)),
    )
    if fn.random.coin_flip(probability=recipe.blur[v], dtype=types.BOOL):
        x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=list(recipe.blur_sigma)))
    if fn.random.coin_flip(probability=recipe.solarize[v], dtype=types.BOOL):
        bright = fn.cast(x >= HALF, dtype=types.UINT8)
        x = bright * (WHITE - x) + (ONE - bright) * x  # all uint8, as without it
    return fn.crop_mirror_normalize(
        x,
        mirror=fn.random.coin_flip(probability=recipe.flip),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[LEVELS * m for m in MEAN],
        std=[LEVELS * s for s in STD],
    )


def _factor(amount: float, jittered: Any) -> Any:
    return 1 + jittered * fn.random.uniform(range=_around(0, amount))


def _around(centre: float, amount: float) -> list[float]:
    return [centre - amount, centre + amount]
