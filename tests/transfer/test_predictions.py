"""The folder of predictions is whole or not there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from transfer.predictions import new_predictions

ALONE: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def test_an_earlier_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Without it a full disk leaves half of the files, or those of two scorings."""
    path = tmp_path / "predictions"
    for text in ("first", "second"):
        with new_predictions(path, ALONE) as folder:
            assert folder is not None
            (folder / text).touch()
            assert not (path / text).exists()
        assert [each.name for each in path.iterdir()] == [text]
    with pytest.raises(UserError, match="disk full"), new_predictions(path, ALONE) as folder:
        assert folder is not None
        (folder / "third").touch()
        raise UserError("disk full")
    assert [each.name for each in path.iterdir()] == ["second"]
    assert [each.name for each in tmp_path.iterdir()] == ["predictions"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Without it the files behind a link are deleted, or the link stays as a hidden file."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").touch()
    path = tmp_path / "run/predictions"
    path.parent.mkdir()
    path.symlink_to(other)
    with new_predictions(path, ALONE):
        pass
    assert [each.name for each in path.parent.iterdir()] == ["predictions"]
    assert (other / "kept").exists() and not path.is_symlink()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Without it a traceback ends the run after its last step."""
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"run/predictions: Not a directory"),
        new_predictions(tmp_path / "run/predictions", ALONE),
    ):
        pass
