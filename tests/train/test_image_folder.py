"""A run on a folder of images: that of its beton, bit for bit, also when it goes on with it."""

from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import UserError
from tests.helpers.betons import varied
from tests.helpers.training import IMAGES, assert_same_tensors, run_dir, small_run, trainer
from tools import build_dataset
from train.config import RunConfig
from train.run.checkpoint import latest


def test_training_from_a_folder_is_training_from_its_beton(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a first hour without packing sees other images, views or order, and cannot be
    resumed, or a file that has changed since replaces another image without a word.
    """
    photos, beton = tmp_path / "photos", tmp_path / "photos.beton"
    photos.mkdir()
    for number, pixels in enumerate(varied(IMAGES)):
        Image.fromarray(pixels).save(photos / f"{number}.jpg", quality=90)
    build_dataset.main(["folder", "--root", str(photos), "--out", str(beton), "--workers", "1"])
    packed = small_run(beton, tmp_path, "packed", max_steps=4)
    trainer(packed).train()

    def go_on(steps: int, data: Path) -> RunConfig:
        run = small_run(data, tmp_path, "loose", max_steps=steps)
        trainer(run, "auto").train()
        return run

    go_on(2, photos)
    assert capsys.readouterr().err.count("data.path is a folder: its index took") == 1
    go_on(3, photos)
    loose = go_on(4, beton)
    assert_same_tensors(*(latest(run_dir(run)) or Path() for run in (packed, loose)))
    Image.fromarray(varied(1)[0]).save(photos / "7.jpg", quality=80)
    with pytest.raises(UserError, match=r"data\.path: .*photos is not the data of"):
        go_on(5, photos)
