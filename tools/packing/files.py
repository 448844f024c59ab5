"""Looking for files in folders of fixed layouts."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pipeline.errors import UserError
from pipeline.folders import Left, as_url, is_dir, is_folder, left_aside, require_root
from tools.packing import archives
from tools.packing.places import Place
from tools.packing.remote import Remote

T = TypeVar("T")


def bounded(items: Iterable[T], name: Place) -> Iterator[T]:
    """The images or rows of `name`. Raises UserError if there are too many to list in memory."""
    for count, item in enumerate(items):
        if count == archives.MAX_FILES:
            raise UserError(f"{name}: more than {archives.MAX_FILES:,} files")
        yield item


def require_folder(root: Path, name: str, content: str) -> Path:
    """ROOT/name. Raises UserError, with the expected `content`, if it is not a folder."""
    folder = root / name
    if not is_folder(folder):
        if as_url(str(root)):
            require_root(root)
        raise UserError(f"expected {folder}/{content}; {contents(root)}")
    return folder


def entries(folder: Path, left: Left) -> Iterator[os.DirEntry[str]]:
    """The entries of `folder` without those that are left aside, which are counted."""
    try:
        with os.scandir(folder) as scan:
            for entry in scan:
                if reason := left_aside(entry.name, is_dir(entry)):
                    left[reason] += 1
                else:
                    yield entry
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def is_archive(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file with an archive's name."""
    return archives.is_archive(entry.name) and not is_dir(entry)


def stem(name: str) -> str:
    """An archive's name without its suffix."""
    suffixes = archives.UNREAD + archives.SUFFIXES
    return name[: -next(len(suffix) for suffix in suffixes if name.lower().endswith(suffix))]


def contents(folder: Place) -> str:
    """The content of `folder`, for an error message."""
    if isinstance(folder, Remote):
        return f"{folder} holds none"
    if not is_folder(folder):
        return f"{folder} is {'not a folder' if os.path.lexists(folder) else 'missing'}"
    names = sorted(entry.name + "/" * is_dir(entry) for entry in entries(folder, Left()))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5]) + more}" if names else f"{folder} is empty"
