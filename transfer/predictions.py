"""The folder of a run with what its model says about the scored images."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from pipeline.errors import UserError

FOLDER = "predictions"
"""Its name in the run's folder."""


@contextmanager
def new_predictions(path: Path | None, accelerator: Accelerator) -> Iterator[Path | None]:
    """A folder that all processes fill. At the end of the `with` it becomes `path`, in place of an
    earlier one; after an error it is deleted. None without a `path`. Raises UserError.
    """
    if path is None:
        yield None
        return
    beside, before = (path.with_name(f".{path.name}.{state}") for state in ("new", "old"))
    is_main = accelerator.is_main_process
    if is_main:
        _remove(beside)
        with _named(path):
            beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield beside
        accelerator.wait_for_everyone()
        if is_main:
            with _named(path):
                if path.exists():
                    _remove(before)
                    path.rename(before)
                beside.rename(path)
            _remove(before)
            print(f"wrote {path}")
    finally:
        if is_main:
            _remove(beside)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
