"""The files of a source: below a folder of this machine, or behind a URL."""

from collections.abc import Iterator
from pathlib import Path

from pipeline import folders
from pipeline.images import Limits, read_file
from tools.packing.containers import Blob, LocalBlob
from tools.packing.remote import Remote

Place = Path | Remote


def open_blob(place: Place) -> Blob:
    """A file, to be read at any position. Raises OSError."""
    return place.open() if isinstance(place, Remote) else LocalBlob(place)


def read(place: Place, limits: Limits) -> bytes:
    """All bytes of an image file. Raises BadImage."""
    return place.read(limits) if isinstance(place, Remote) else read_file(place, limits)


def walk(top: Place, left: folders.Left, start: str = "") -> Iterator[tuple[str, str]]:
    """As `pipeline.folders.walk`."""
    return top.walk(left, start) if isinstance(top, Remote) else folders.walk(top, left, start)


def is_file(place: Place, suffixes: tuple[str, ...]) -> bool:
    """Whether a place is a file: of a URL its name says so, which costs no request."""
    if isinstance(place, Remote):
        return place.name.lower().endswith(suffixes)
    return folders.is_file(place)


def require_root(place: Place) -> None:
    """Raises UserError if a place is not a folder. That of a URL shows when it is listed."""
    if not isinstance(place, Remote):
        folders.require_root(place)
