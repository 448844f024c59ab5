"""The files below a folder: one walk, and one rule for what it leaves aside, for every command.

Links are followed. Left aside are hidden files and folders, whose names begin with a dot, such as
macOS's ._a.jpg and .ipynb_checkpoints; the folders `SERVICE_FOLDERS`, of systems and programs;
and files that are no images by their suffix. Each command says what it left aside.
"""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError, printable
from pipeline.formats import IMAGE_SUFFIXES

SERVICE_FOLDERS = frozenset((
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp",  # storage servers
    "__macosx", "$recycle.bin", "system volume information", "lost+found",  # operating systems
    "thumbs.db",
))  # fmt: skip
"""Folders of thumbnails, deleted files and the like, in lower case. They may hold images."""
MAX_FOLDERS = 2_000_000
"""Below a root. Links from folder to folder can make paths without end."""
_URL = re.compile(r"([a-z][a-z0-9+.-]*):/+(.*)", re.IGNORECASE | re.DOTALL)

Left = Counter[str]
"""Number of files and folders that were left aside, by reason."""


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
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise UserError(f"{path}: {getattr(error, 'strerror', error)}") from error


def require_root(root: Path) -> None:
    """Raises UserError if `root` is not a folder."""
    if not is_folder(root):
        if url := as_url(str(root)):
            raise UserError(f"{url}: a URL; give a folder on this machine")
        raise UserError(f"{root}: {'not a' if is_file(root) else 'no such'} folder")


def refuse_url(path: Path) -> None:
    """Raises UserError if `path` is a URL. Written to, it would be a folder called "s3:" here."""
    if (url := as_url(str(path))) and not os.path.lexists(path.parts[0]):
        raise UserError(f"{url}: a URL; give a path on this machine")


def as_url(name: str) -> str:
    """`name` as a URL to show, if it is one: with the slash that paths lose, without a password or
    a query; else "". A letter of a drive is none.
    """
    match = _URL.fullmatch(name)
    if not match or len(match[1]) == 1:
        return ""
    local = match[1].lower() == "file"  # of this machine: file:///a
    host, slash, path = match[2].partition("?")[0].partition("/")
    return f"{match[1]}://{'/' * local}{host.rpartition('@')[2]}{slash}{path}"


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def left_aside(name: str, folder: bool) -> str:
    """Why a file or `folder` of this name is left aside, or ""."""
    if name.startswith("."):
        return "hidden"
    return name if folder and name.lower() in SERVICE_FOLDERS else ""


def why_left_aside(path: str) -> str:
    """Why a file is left aside because of its name or of the folders in its path, or ""."""
    *folders, name = path.split("/")
    reasons = [left_aside(folder, True) for folder in folders if folder not in ("..", ".")]
    return next(filter(None, reasons), "") or left_aside(name, False)


def is_image(name: str, left: Left) -> bool:
    """Whether a file is an image by its suffix. Counts the others.

    A broken link is an image, so that it is named.
    """
    if name.lower().endswith(IMAGE_SUFFIXES):
        return True
    suffix = re.search(r"\.[a-z0-9]{1,8}$", name.lower())
    left[suffix[0] if suffix else "of other names"] += 1
    return False


_Folder = tuple[int, int]  # device and inode


def walk(top: Path, left: Left, start: str = "") -> Iterator[tuple[str, str]]:
    """The files below `top`, in no order: their path below `top`, and why they are unusable, or "".

    Searches only those entries of `top` whose names begin with `start`. A link to one of the
    folders above it is left aside. Raises UserError at more than MAX_FOLDERS folders.
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
                left["link to a folder that contains it"] += 1
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not (name or entry.name.startswith(start)):
                        continue
                    is_folder = is_dir(entry)
                    path = f"{name}/{entry.name}" if name else entry.name
                    if reason := left_aside(entry.name, is_folder):
                        left[reason] += 1
                    elif is_folder:
                        pending.append((path, (*above, here)))
                    else:
                        yield path, ""
        except OSError as error:
            if not name:
                raise UserError(f"{folder}: {error.strerror}") from error
            yield name, error.strerror or str(error)


def find_images(top: Path) -> tuple[list[Path], Left]:
    """The images below `top`, sorted by the parts of their paths, and what was left aside. Raises
    UserError if `top` is not a folder, or a folder cannot be read.
    """
    require_root(top)
    left, found = Left(), []
    for name, fault in walk(top, left):
        if fault:
            raise UserError(f"{printable(str(top / name))}: {fault}")
        if is_image(name, left):
            found.append(top / name)
    return sorted(found), left


def say_found(count: int, place: object, left: Left) -> None:
    """Print on stderr how many images were found, and what was left aside, on one line."""
    plural = "" if count == 1 else "s"
    _say(f"found {count:,} image{plural} in {printable(str(place))}{aside(left)}")
    if phones := sum(left[suffix] for suffix in (".heic", ".heif")):
        _say(
            f"note: {phones:,} photographs of phones (.heic) cannot be read: convert them to JPEG"
            " (magick mogrify -format jpg *.heic)"
        )


def say_taken(count: int, lists: Sequence[Path]) -> None:
    """Print on stderr how many of the images that were found are in the files `lists`."""
    names = " and ".join(printable(str(path)) for path in lists)
    _say(f"taken: {count:,} of them, listed in {names}")


def _say(line: str) -> None:
    """Print a line on stderr. Only the first process of several does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def aside(left: Left) -> str:
    """The end of a sentence: what was left aside, the most frequent first, or ""."""
    most = left.most_common(8)
    shown = [f"{number:,} {printable(reason)}" for reason, number in most if number]
    more = left.total() - sum(number for _, number in most)
    shown += [f"{more:,} others"] * (more > 0)
    return f"; left aside: {', '.join(shown)}" if shown else ""
