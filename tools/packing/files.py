"""Looking for image files in folders."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.formats import IMAGE_SUFFIXES
from tools.packing import archives


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises UserError where the system refuses to say."""
    return _is(stat.S_ISDIR, path)


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file. Raises UserError where the system refuses to say."""
    return _is(stat.S_ISREG, path)


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def require_folder(root: Path, name: str, content: str) -> Path:
    folder = root / name
    if not is_folder(folder):
        raise UserError(f"expected {folder}/{content}; {contents(root)}")
    return folder


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What `folder` holds, less the hidden files that macOS and others leave beside images."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_archive(entry: os.DirEntry[str]) -> bool:
    return archives.is_archive(entry.name) and not is_dir(entry)


def stem(name: str) -> str:
    """An archive's name without its suffix."""
    suffixes = archives.UNREAD + archives.SUFFIXES
    return name[: -next(len(suffix) for suffix in suffixes if name.lower().endswith(suffix))]


def is_hidden(path: str) -> bool:
    """Whether a path in an archive is that of a hidden file, or in a hidden folder."""
    if "/." not in path and not path.startswith("."):  # nearly always
        return False
    return any(part.startswith(".") and part != ".." for part in path.split("/"))


def is_image_name(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(path)


_Folder = tuple[int, int]  # device and inode


def walk(top: Path, start: str) -> Iterator[tuple[str, str]]:
    """The files below `top`, in what begins with `start` there: their paths below it, and a reason
    where one is unusable. Links are followed; a loop of them shows up in the folders above.
    """
    left: list[tuple[str, tuple[_Folder, ...]]] = [("", ())]
    while left:  # a recursion would end at 1,000 levels
        name, above = left.pop()
        folder = top / name
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
                        left.append((path, (*above, here)))
                    else:
                        yield path, ""
        except OSError as error:
            if not name:
                raise UserError(f"{folder}: {error.strerror}") from error
            yield name, error.strerror or str(error)


def contents(folder: Path) -> str:
    """What is there instead, for an error line."""
    if not is_folder(folder):
        return f"{folder} is {'not a folder' if os.path.lexists(folder) else 'not there'}"
    names = sorted(entry.name + "/" * is_dir(entry) for entry in entries(folder))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5]) + more}" if names else f"{folder} is empty"
