"""Looking for image files in folders."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pipeline.errors import UserError
from pipeline.formats import IMAGE_SUFFIXES
from tools.packing import archives

MAX_FOLDERS = 2_000_000
"""Below a root. Links from folder to folder can make paths without end."""

T = TypeVar("T")


def bounded(items: Iterable[T], name: Path) -> Iterator[T]:
    """The images or rows of `name`. Raises UserError if there are too many to list in memory."""
    for count, item in enumerate(items):
        if count == archives.MAX_FILES:
            raise UserError(f"{name}: more than {archives.MAX_FILES:,} files")
        yield item


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises UserError if the path cannot be examined."""
    return _is(stat.S_ISDIR, path)


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file. Raises UserError if the path cannot be examined."""
    return _is(stat.S_ISREG, path)


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def require_root(root: Path) -> None:
    """Raises UserError if `root` is not a folder."""
    if not is_folder(root):
        raise UserError(f"{root}: {'not a' if is_file(root) else 'no such'} folder")


def require_folder(root: Path, name: str, content: str) -> Path:
    """ROOT/name. Raises UserError, with the expected `content`, if it is not a folder."""
    folder = root / name
    if not is_folder(folder):
        raise UserError(f"expected {folder}/{content}; {contents(root)}")
    return folder


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of `folder` without hidden files, such as those of macOS."""
    try:
        with os.scandir(folder) as scan:
            yield from (entry for entry in scan if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_archive(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file with an archive's name."""
    return archives.is_archive(entry.name) and not is_dir(entry)


def stem(name: str) -> str:
    """An archive's name without its suffix."""
    suffixes = archives.UNREAD + archives.SUFFIXES
    return name[: -next(len(suffix) for suffix in suffixes if name.lower().endswith(suffix))]


def is_hidden(path: str) -> bool:
    """Whether a path in an archive is a hidden file, or is in a hidden folder."""
    if "/." not in path and not path.startswith("."):  # the usual case, without the slow split
        return False
    return any(part.startswith(".") and part != ".." for part in path.split("/"))


def is_image_name(path: str) -> bool:
    """Whether a path in an archive is an image that is not hidden."""
    return path.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(path)


_Folder = tuple[int, int]  # device and inode


def walk(top: Path, start: str) -> Iterator[tuple[str, str]]:
    """The files below `top`: their path below `top`, and why they are unusable, or "".

    Searches only those entries of `top` whose names begin with `start`. Follows links. A link to
    one of the folders above it is unusable. Raises UserError at more than MAX_FOLDERS folders.
    """
    count = 0
    pending: list[tuple[str, tuple[_Folder, ...]]] = [("", ())]
    while pending:  # a recursion would end at 1,000 levels
        name, above = pending.pop()
        folder = top / name
        if (count := count + 1) > MAX_FOLDERS:
            raise UserError(
                f"{top}: more than {MAX_FOLDERS:,} folders, those behind links included"
            )
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                yield name, "a link to a folder that contains it"
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not (name or entry.name.startswith(start)):
                        continue
                    path = f"{name}/{entry.name}" if name else entry.name
                    if is_dir(entry):
                        pending.append((path, (*above, here)))
                    else:
                        yield path, ""
        except OSError as error:
            if not name:
                raise UserError(f"{folder}: {error.strerror}") from error
            yield name, error.strerror or str(error)


def contents(folder: Path) -> str:
    """The content of `folder`, for an error message."""
    if not is_folder(folder):
        return f"{folder} is {'not a folder' if os.path.lexists(folder) else 'missing'}"
    names = sorted(entry.name + "/" * is_dir(entry) for entry in entries(folder))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5]) + more}" if names else f"{folder} is empty"
