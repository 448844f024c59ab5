"""Which image files a data set consists of, where they are, and in which order they are stored."""

import csv
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.formats import IMAGE_SUFFIXES
from tools import archives
from tools.archives import Member

KNOWN_COUNTS = {"coco": 118_287, "cocoplus": 241_690, "imagenet": 1_281_167}
"""Images in the sets that people publish results on."""


@dataclass
class Source:
    """The images of a data set, in the stored order: `names` and where each of them is.

    An image is a file below `root`, or bytes of one of the `containers`. About 130 bytes each.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    """Paths below `root` with forward slashes; those in an archive as if it were unpacked."""
    classes: list[str] | None = None
    """Class names in the order of the labels; None where there are none."""
    labels: array | None = None
    """For each name its label; None for a set without."""
    faults: dict[int, str] = field(default_factory=dict)
    """Position to reason of each image that is known to be unusable before it is read."""
    containers: list[Path] = field(default_factory=list)
    container: array = field(default_factory=lambda: array("i"))
    """For each name the archive it is in, -1 for a file of its own."""
    offset: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("q"))
    """For each name its bytes in the archive; negative where they are deflated."""
    crc: array = field(default_factory=lambda: array("q"))
    """For each name the archive's CRC-32 of it; -1 where there is none."""

    def __len__(self) -> int:
        return len(self.names)

    def add_files(self, names: Iterable[str]) -> None:
        """Add files below `root`."""
        for name in names:
            self._add(name)

    def add_archive(self, path: Path, chosen: Iterable[Member]) -> None:
        """Add images of the archive at `path`; their names are already those to be stored."""
        self.containers.append(path)
        for member in chosen:
            if member.fault:
                self.faults[len(self.names)] = member.fault
            size = -member.size if member.deflated else member.size
            number = len(self.containers) - 1
            self._add(member.name, number, member.offset, size, member.crc)

    def add_fault(self, name: str, reason: str) -> None:
        """Add something that cannot be packed."""
        self.faults[len(self.names)] = reason
        self._add(name)

    def _add(
        self, name: str, container: int = -1, offset: int = 0, size: int = 0, crc: int = -1
    ) -> None:
        self.names.append(name)
        self.container.append(container)
        self.offset.append(offset)
        self.size.append(size)
        self.crc.append(crc)


def coco(root: Path) -> Source:
    """COCO: ROOT/train2017/*.jpg, or ROOT/train2017.zip."""
    return _flat(root, "train2017")


def cocoplus(root: Path) -> Source:
    """COCO+: ROOT/train2017/*.jpg, then ROOT/unlabeled2017/*.jpg; or zips of these names."""
    return _flat(root, "train2017", "unlabeled2017")


def imagenet(root: Path) -> Source:
    """ImageNet: ROOT/train/<wnid>/*.JPEG, ROOT/train/<wnid>.tar, or ROOT/ILSVRC2012_img_train.tar.

    The label is the rank of the sorted wnid.
    """
    whole = root / "ILSVRC2012_img_train.tar"
    if not (root / "train").is_dir() and whole.is_file():
        return _imagenet_of_one_tar(root, whole)
    folder = _require_folder(root, "train", "<wnid>/*.JPEG")
    entries = _entries(folder)
    found = {e.name.removesuffix(".tar") for e in entries if _is_dir(e) or e.name.endswith(".tar")}
    if not found:
        raise UserError(
            f"{folder}: expected a folder per class, <wnid>/*.JPEG, or <wnid>.tar; {_found(folder)}"
        )
    source = Source(root, classes=sorted(found), labels=array("q"))
    for label, name in enumerate(sorted(found)):
        before = len(source)
        _add_folder(source, f"train/{name}", "*.JPEG")
        source.labels.extend([label] * (len(source) - before))  # type: ignore[union-attr]
    return source


def bdd100k(root: Path) -> Source:
    """BDD100K: ROOT/images/100k/train/*.jpg, or the zip as it is downloaded.

    That is ROOT/100k_images_train.zip, or in older downloads ROOT/bdd100k_images_100k.zip.
    """
    zips = [root / "100k_images_train.zip", root / "bdd100k_images_100k.zip"]
    archive = next((path for path in zips if path.is_file()), None)
    if archive is None or (root / "images").is_dir():
        return _flat(root, "images/100k/train")
    source = Source(root)
    _add_archive(source, archive, r"(?:(?:.*/)?train/)?([^/]+)", "images/100k/train")
    return source


def openimages(root: Path) -> Source:
    """Open Images: all images below ROOT/train*, and in .tar or .zip files there."""
    folder = _require_folder(root, "", "train*")
    parts = [entry for entry in _entries(folder) if entry.name.startswith("train")]
    walked = (item for entry in parts for item in _walk_entry(entry, "", ()))
    return _tree(root, walked, "train*/ with image files")


def folder(root: Path) -> Source:
    """Any folder: all images below ROOT, and in .tar or .zip files there, sorted by path."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return _tree(root, _walk(root, "", ()), "image files")


def listed(path: Path, root: Path | None = None) -> Source:
    """The files that a list names, in its order: a path a line, or CSV with path and label.

    Paths are relative to `root`, by default the list's own folder. Labels that are all whole
    numbers are kept; others are classes, ranked by name.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path}: names no files")
    source = Source(root or path.parent)
    source.add_files(os.path.normpath(name) for name, _ in rows)
    given = [label for _, label in rows if label is not None]
    if given and len(given) < len(rows):
        raise UserError(f"{path}: {len(rows) - len(given):,} of {len(rows):,} rows have no label")
    if given:
        source.labels, source.classes = _ranked(given)
    return _mark_duplicates(source)


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    """Path and label, or None, of each line."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix.lower() not in (".csv", ".tsv"):
                for line in file:
                    if line.strip():
                        yield line.rstrip("\r\n"), None
                return
            table = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            for number, row in enumerate(row for row in table if row):
                if number == 0 and row[0].strip().lower() in _HEADINGS:
                    continue
                if not row[0] or len(row) > 2:
                    raise UserError(f"{path}: line {table.line_num}: expected path or path,label")
                yield row[0], row[1].strip() if len(row) == 2 else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{path}: line {table.line_num}: {error}") from error


_HEADINGS = ("path", "file", "filename", "file_name", "image", "name")


def _ranked(labels: list[str]) -> tuple[array, list[str] | None]:
    if all(re.fullmatch(r"[0-9]{1,18}", label) for label in labels):
        return array("q", map(int, labels)), None
    classes = sorted(set(labels))
    rank = {name: label for label, name in enumerate(classes)}
    return array("q", (rank[label] for label in labels)), classes


SOURCES: dict[str, Callable[[Path], Source]] = {
    "coco": coco,
    "cocoplus": cocoplus,
    "imagenet": imagenet,
    "bdd100k": bdd100k,
    "openimages": openimages,
    "folder": folder,
}


def _flat(root: Path, *names: str) -> Source:
    source = Source(root)
    for name in names:
        _add_folder(source, name, "*.jpg")
    return source


def _add_folder(source: Source, name: str, content: str) -> None:
    """Add the images directly in ROOT/name, sorted; or those in ROOT/name.zip or ROOT/name.tar."""
    here, before = source.root / name, len(source)
    packed = [here.with_name(here.name + suffix) for suffix in archives.SUFFIXES]
    archive = next((path for path in packed if path.is_file()), None)
    if here.is_dir() or archive is None:
        folder = _require_folder(source.root, name, content)
        source.add_files(sorted(f"{name}/{e.name}" for e in _entries(folder) if _is_image(e)))
        if len(source) == before:
            raise UserError(f"{folder}: expected image files; {_found(folder)}")
        return
    # Published archives hold train2017/x.jpg, x.jpg or ./x.jpg: the file's own name is what counts.
    _add_archive(source, archive, r"(?:.*/)?([^/]+)", name)


def _add_archive(source: Source, path: Path, pattern: str, folder: str) -> None:
    """Add the images of the archive at `path` whose names match `pattern`, sorted, as if what its
    groups hold lay in `folder`.
    """
    before = len(source)
    chosen = [
        member._replace(name="/".join([folder, *match.groups()]))
        for member in archives.members(path)
        if _is_image_name(member.name) and (match := re.fullmatch(pattern, member.name))
    ]
    source.add_archive(path, sorted(chosen))
    if len(source) == before:
        raise UserError(f"{path}: holds no image files where they are expected")
    _mark_duplicates(source, before)


def _imagenet_of_one_tar(root: Path, path: Path) -> Source:
    """The tar of 1,000 tars as it is downloaded."""
    source = Source(root)
    _add_archive(source, path, r"(?:.*/)?([^/]+)\.tar/(?:.*/)?([^/]+)", "train")
    wnids = [name.split("/")[1] for name in source.names]
    source.classes = sorted(set(wnids))
    rank = {name: label for label, name in enumerate(source.classes)}
    source.labels = array("q", (rank[wnid] for wnid in wnids))
    return source


def _tree(root: Path, walked: Iterable[tuple[str, str]], expected: str) -> Source:
    """A source of what `_walk` found, sorted by path; an archive's images come at its place."""
    source, compressed = Source(root), ""
    names: list[str] = []
    reasons: dict[str, str] = {}
    for name, reason in walked:
        names.append(name)
        if reason:
            reasons[name] = reason
    names.sort()
    for name in names:
        if name in reasons:
            source.add_fault(name, reasons[name])
        elif name.lower().endswith(archives.COMPRESSED):
            compressed = name
        elif name.lower().endswith(archives.SUFFIXES):
            chosen = (
                member._replace(name=f"{name}/{member.name}")
                for member in archives.members(root / name)
                if _is_image_name(member.name)
            )
            source.add_archive(root / name, sorted(chosen))
        else:
            source.add_files([name])
    if len(source):
        return _mark_duplicates(source) if source.containers else source
    if compressed:
        raise UserError(f"{root / compressed}: compressed; gunzip it, a .tar is read in place")
    raise UserError(f"{root}: expected {expected} ({' '.join(IMAGE_SUFFIXES)}); {_found(root)}")


def _mark_duplicates(source: Source, start: int = 0) -> Source:
    """The second and later images of one name are bad: one would replace the other unpacked."""
    seen: set[str] = set()
    for position in range(start, len(source)):
        name = source.names[position]
        if name in seen:
            source.faults[position] = "duplicate path"
        seen.add(name)
    return source


def _require_folder(root: Path, name: str, content: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise UserError(f"expected {folder}/{content}; {_found(root)}")
    return folder


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What `folder` holds, less the hidden files that macOS and others leave beside images."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its suffix. A broken link counts, so that packing names it."""
    return _is_image_name(entry.name) and not _is_dir(entry)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES) and not path.rsplit("/", 1)[-1].startswith(".")


_Folder = tuple[int, int]  # device and inode


def _walk(folder: Path, name: str, above: tuple[_Folder, ...]) -> Iterator[tuple[str, str]]:
    """The images and archives below `folder`: their names, which begin with `name`, and a reason
    where one is unusable. Links are followed; a loop of them shows up in `above`.
    """
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            yield name.rstrip("/"), "a link to a folder that contains it"
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield from _walk_entry(entry, name, (*above, here))
    except OSError as error:
        if not name:
            raise UserError(f"{folder}: {error.strerror}") from error
        yield name.rstrip("/"), error.strerror or str(error)


def _walk_entry(
    entry: os.DirEntry[str], name: str, above: tuple[_Folder, ...]
) -> Iterator[tuple[str, str]]:
    if _is_dir(entry):
        yield from _walk(Path(entry.path), f"{name}{entry.name}/", above)
    elif entry.name.lower().endswith(_WALKED):
        yield name + entry.name, ""


_WALKED = IMAGE_SUFFIXES + archives.SUFFIXES + archives.COMPRESSED


def _found(folder: Path) -> str:
    """What is there instead, for an error line."""
    if not folder.is_dir():
        return f"{folder} is {'not a folder' if folder.exists() else 'not there'}"
    names = sorted(entry.name + "/" * _is_dir(entry) for entry in _entries(folder))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder} holds {', '.join(names[:5]) + more}" if names else f"{folder} is empty"
