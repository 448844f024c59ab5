"""lightly's data set and its BYOL transform, which is SlotCon's but for the crops' overlap."""

from types import SimpleNamespace

from lightly.data import LightlyDataset
from lightly.transforms.byol_transform import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
)

from tests.benchmark_peers.peers import Job, Views
from tests.benchmark_peers.workers import load_views


def open_views(job: Job) -> Views:
    settings = [_settings(job.recipe, v) for v in range(2)]
    transform = BYOLTransform(BYOLView1Transform(**settings[0]), BYOLView2Transform(**settings[1]))
    return load_views(job, _Pairs(LightlyDataset(job.files, transform=transform)))


def _settings(recipe: SimpleNamespace, v: int) -> dict[str, object]:
    return {
        "input_size": recipe.size,
        "cj_prob": recipe.jitter,
        "cj_bright": recipe.brightness,
        "cj_contrast": recipe.contrast,
        "cj_sat": recipe.saturation,
        "cj_hue": recipe.hue,
        "min_scale": recipe.min_scale,
        "random_gray_scale": recipe.grey,
        "gaussian_blur": recipe.blur[v],
        "sigmas": recipe.blur_sigma,
        "solarization_prob": recipe.solarize[v],
        "hf_prob": recipe.flip,
    }


class _Pairs:
    """The views alone, without target and file name."""

    def __init__(self, dataset: LightlyDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[object, ...]:
        views, _, _ = self.dataset[i]
        return tuple(views)
