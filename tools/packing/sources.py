"""The images of each data set: where they are, and the order in which they are stored.

To add a data set, write a function from its root folder to a `Source` and add it to `SOURCES`.
"""

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline import folders
from pipeline.errors import UserError, printable
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.manifest import Option
from tools.packing import archives, files
from tools.packing.archives import Archive, Member
from tools.packing.containers import Container
from tools.packing.places import Place, is_file, require_root, walk

KNOWN_COUNTS = {"coco": 118_287, "cocoplus": 241_690, "imagenet": 1_281_167}
"""Number of images in the data sets of published results."""
SIDECARS = frozenset((
    *(".cls", ".cap", ".caption", ".csv", ".id", ".index", ".json", ".label", ".labels", ".npy"),
    *(".pickle", ".pkl", ".pyd", ".target", ".txt", ".xml", ".yaml", ".yml"),
))  # fmt: skip
"""Suffixes of files that hold labels or captions, beside an image of the same name."""


@dataclass
class Source:
    """The images of a data set in the stored order: the name and the position of each image.

    An image is a file below `root`, or a part of one of the `containers`. Memory: about 130 bytes
    per image.
    """

    root: Place
    names: list[str] = field(default_factory=list)
    """Paths below `root` with forward slashes, as if all archives were unpacked."""
    classes: list[str] | None = None
    """Class names in the order of the labels; None without classes."""
    labels: array | None = None
    """The label of each image; None if the data set has none."""
    faults: dict[int, str] = field(default_factory=dict)
    """Number of each unusable image, archive or folder, and the reason."""
    left: folders.Left = field(default_factory=folders.Left)
    """Number of files and folders that were left aside, by reason."""
    sidecars: Counter[str] = field(default_factory=Counter)
    """Of these, files that say something of an image, by suffix: labels or captions."""
    containers: list[Container] = field(default_factory=list)
    """The archives and tables."""
    container: array = field(default_factory=lambda: array("i"))
    """Number of each image's container in `containers`; -1 for a file outside of them."""
    offset: array = field(default_factory=lambda: array("q"))
    """Position of each image's bytes in the archive, or number of its row in the table."""
    size: array = field(default_factory=lambda: array("q"))
    """Bytes of each image in the archive; negative if they are deflated. 0 in a table."""
    crc: array = field(default_factory=lambda: array("q"))
    """The archive's CRC-32 of each image; -1 without one."""
    options: dict[str, Option] = field(default_factory=dict)
    """What was chosen of it, for the manifest."""

    def __len__(self) -> int:
        return len(self.names)

    def add_files(self, names: Iterable[str]) -> None:
        """Add files below `root`."""
        for name in names:
            self._add(name)

    def add_archive(self, archive: Archive, chosen: Iterable[Member]) -> None:
        """Add images of an archive. The members already have the names to store."""
        number = len(self.containers)
        self.containers.append(archive)
        for member in chosen:
            if member.fault:
                self.faults[len(self.names)] = member.fault
            size = -member.size if member.deflated else member.size
            self._add(member.name, number, member.offset, size, member.crc)

    def add_rows(self, table: Container, names: Iterable[str]) -> None:
        """Add all rows of a table under these names."""
        self.containers.append(table)
        for row, name in enumerate(names):
            self._add(name, len(self.containers) - 1, row)

    def add_fault(self, name: str, reason: str) -> None:
        """Add a file or folder that cannot be packed."""
        self.faults[len(self.names)] = reason
        self._add(name)

    def take(self, positions: Sequence[int]) -> "Source":
        """The images at these positions, in their order."""

        def column(values: array) -> array:
            return array(values.typecode, (values[i] for i in positions))

        new = replace(
            self,
            names=[self.names[i] for i in positions],
            labels=None if self.labels is None else column(self.labels),
            faults={k: self.faults[i] for k, i in enumerate(positions) if i in self.faults},
            container=column(self.container),
            offset=column(self.offset),
            size=column(self.size),
            crc=column(self.crc),
        )
        expected: dict[int, list[int]] = {number: [] for number in range(len(self.containers))}
        for number, offset in zip(new.container, new.offset, strict=True):
            expected.setdefault(number, []).append(offset)
        for number, container in enumerate(self.containers):
            container.expect(expected[number])
        return new

    def _add(
        self, name: str, container: int = -1, offset: int = 0, size: int = 0, crc: int = -1
    ) -> None:
        if len(self) == archives.MAX_FILES:
            raise UserError(f"{self.root}: more than {archives.MAX_FILES:,} files")
        self.names.append(name)
        self.container.append(container)
        self.offset.append(offset)
        self.size.append(size)
        self.crc.append(crc)


def coco(root: Path) -> Source:
    """COCO: ROOT/train2017/*.jpg, or ROOT/train2017.zip; also in ROOT/coco2017, as from Kaggle."""
    return _flat(_found(root, "train2017", "coco2017"), "train2017")


def cocoplus(root: Path) -> Source:
    """COCO+: ROOT/train2017/*.jpg and ROOT/unlabeled2017/*.jpg, or zip files of these names."""
    return _flat(_found(root, "train2017", "coco2017"), "train2017", "unlabeled2017")


def imagenet(root: Path) -> Source:
    """ImageNet: ROOT/train/<wnid>/*.JPEG, ROOT/train/<wnid>.tar, or ROOT/ILSVRC2012_img_train.tar.

    ROOT/train may also be ROOT/ILSVRC/Data/CLS-LOC/train, as from Kaggle, or ROOT itself. The label
    is the rank of the wnid in sorted order.
    """
    whole = root / "ILSVRC2012_img_train.tar"
    if not folders.is_folder(root / "train") and folders.is_file(whole):
        return _imagenet_of_one_tar(root, whole)
    root = _found(root, "train", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
    folder = files.require_folder(root, "train", "<wnid>/*.JPEG")
    source = Source(root, classes=[], labels=array("q"))
    entries = list(files.entries(folder, source.left))
    unpacked = {entry.name for entry in entries if folders.is_dir(entry)}
    packed = {entry.name: files.stem(entry.name) for entry in entries if files.is_archive(entry)}
    for name in {entry.name for entry in entries} - unpacked - packed.keys():
        source.left["images in no class"] += folders.is_image(name, source.left)
    source.classes = sorted(unpacked | set(packed.values()))
    if not source.classes:
        raise UserError(
            f"{folder}: expected a folder per class, <wnid>/*.JPEG, or <wnid>.tar;"
            f" {files.contents(folder)}"
        )
    for label, wnid in enumerate(source.classes):
        of_class = sorted(name for name, stem in packed.items() if stem == wnid)
        _add_class(source, root, wnid, wnid in unpacked, of_class)
        source.labels.extend([label] * (len(source) - len(source.labels)))  # type: ignore
    if source.sidecars[".cls"]:
        raise UserError(
            f"{folder}: holds .cls files beside its images, as a WebDataset does: its archives are"
            " no classes; `folder` packs the images without labels"
        )
    return require_any(source)


def bdd100k(root: Path) -> Source:
    """BDD100K: ROOT/images/100k/train/*.jpg, or the downloaded zip file.

    Its name is ROOT/100k_images_train.zip, or ROOT/bdd100k_images_100k.zip in older downloads.
    """
    zips = [root / "100k_images_train.zip", root / "bdd100k_images_100k.zip"]
    archive = next((path for path in zips if folders.is_file(path)), None)
    if archive is None or folders.is_folder(root / "images"):
        return _flat(root, "images/100k/train")
    source = Source(root)
    _add_archive(source, archive, r"(?:(?:.*/)?train/)?([^/]+)", "images/100k/train")
    return require_any(source)


def openimages(root: Path) -> Source:
    """Open Images: all images below ROOT/train*, also in .tar and .zip files."""
    files.require_folder(root, "", "train*")
    return _tree(root, "train", "train*/ with image files")


def folder(root: Place) -> Source:
    """Any folder: all images below ROOT, also in .tar and .zip files, sorted by path.

    ROOT may also be one such file.
    """
    if root.name.lower().endswith(archives.SUFFIXES) and is_file(root, archives.SUFFIXES):
        return _tree(root.parent, "", "image files", root.name)
    require_root(root)
    return _tree(root, "", "image files")


def imagefolder(root: Place) -> Source:
    """torchvision's ImageFolder: all images below ROOT/<class>, also in .tar and .zip files.

    The label is the rank of the class in sorted order; the images are sorted by class and path.
    """
    require_root(root)
    whole = _tree(root, "", "<class>/ with image files")
    parts = [name.split("/", 1) for name in whole.names]
    outside = {i for i, part in enumerate(parts) if len(part) == 1 and i not in whole.faults}
    whole.left["images in no class"] += len(outside)
    order = sorted(set(range(len(whole))) - outside, key=parts.__getitem__)
    source = whole.take(order)
    names = [part[0] if len(part) == 2 else "" for part in map(parts.__getitem__, order)]
    names = [files.stem(name) if archives.is_archive(name) else name for name in names]
    source.classes = sorted(set(names) - {""})
    if not source.classes:
        raise UserError(f"{root}: expected a folder per class; {files.contents(root)}")
    rank = {name: label for label, name in enumerate(source.classes)} | {"": -1}
    source.labels = array("q", map(rank.__getitem__, names))
    return source


SOURCES: dict[str, Callable[[Path], Source]] = {
    "coco": coco,
    "cocoplus": cocoplus,
    "imagenet": imagenet,
    "bdd100k": bdd100k,
    "openimages": openimages,
    "imagefolder": imagefolder,
    "folder": folder,
}


def _found(root: Path, name: str, *inside: str) -> Path:
    """The folder that holds `name`: `root`, one of the folders `inside` it, or the one that holds
    `root`, if that is called `name`; `root` if there is none.
    """
    if any(
        folders.is_folder(root / name) or folders.is_file(root / f"{name}{suffix}")
        for suffix in archives.SUFFIXES
    ):
        return root
    if found := next((root / one for one in inside if folders.is_folder(root / one / name)), None):
        return found
    return root.parent if root.name == name and folders.is_folder(root) else root


def _flat(root: Path, *names: str) -> Source:
    source = Source(root)
    for name in names:
        packed = [root / (name + suffix) for suffix in archives.SUFFIXES]
        archive = next((path for path in packed if folders.is_file(path)), None)
        if archive and not folders.is_folder(root / name):
            # Such files contain train2017/x.jpg, x.jpg or ./x.jpg: only the last part counts.
            _add_archive(source, archive, r"(?:.*/)?([^/]+)", name)
        else:
            _add_folder(source, root, name, "*.jpg")
    return require_any(source)


def _add_class(source: Source, root: Path, wnid: str, unpacked: bool, packed: list[str]) -> None:
    """Add an ImageNet class from its folder or archive. A second one of the class is a fault."""
    if unpacked:
        _add_folder(source, root, f"train/{wnid}", "*.JPEG")
    for name in packed:
        path = f"train/{name}"
        if unpacked or name != packed[0]:
            source.add_fault(path, f"class {wnid} is there twice: remove this, or the other")
        elif name.lower().endswith(archives.UNREAD):
            source.add_fault(path, archives.COMPRESSED)
        else:
            _add_archive(source, root / path, r"(?:.*/)?([^/]+)", f"train/{wnid}")


def _add_folder(source: Source, root: Path, name: str, content: str) -> None:
    """Add the images directly in ROOT/name, sorted."""
    folder, before = files.require_folder(root, name, content), len(source)
    names = []
    for entry in files.entries(folder, source.left):
        if folders.is_dir(entry):
            source.left["folders, not searched"] += 1
        elif folders.is_image(entry.name, source.left):
            names.append(f"{name}/{entry.name}")
    source.add_files(sorted(names))
    if len(source) == before:
        raise UserError(f"{folder}: expected image files; {files.contents(folder)}")


def _add_archive(source: Source, path: Place, pattern: str, folder: str) -> None:
    """Add the images of an archive whose names match `pattern`, sorted, and the archive's faults.

    The stored name is `folder` and the groups of `pattern`.
    """
    before, top = len(source), os.path.relpath(str(path), str(source.root))
    chosen = []
    for member in files.bounded(_members(source, path), path):
        match = re.fullmatch(pattern, member.name)
        if not member.name.lower().endswith(IMAGE_SUFFIXES):
            chosen.append(member._replace(name=f"{top}/{member.name}".rstrip("/")))
        elif match:
            chosen.append(member._replace(name="/".join([folder, *match.groups()])))
        else:
            source.left[f"images in other folders of {top}"] += 1
    source.add_archive(Archive(path), sorted(chosen))
    if len(source) == before:
        raise UserError(f"{path}: holds no image files where they are expected")
    mark_duplicates(source, start=before)


def _members(source: Source, path: Place) -> Iterator[Member]:
    """The images in an archive, and the faults of the archive and of the archives in it."""
    samples = _Samples(source.sidecars)
    for member in archives.members(path):
        if reason := folders.why_left_aside(member.name):
            source.left[reason] += 1
        elif not member.name or (member.fault and archives.is_archive(member.name)):
            yield member
        else:
            is_image = folders.is_image(member.name, source.left)
            samples.note(member.name, is_image)
            if is_image:
                yield member


def _imagenet_of_one_tar(root: Path, path: Path) -> Source:
    """The downloaded tar of 1,000 tars. A fault outside of them has the label -1."""
    source = Source(root)
    _add_archive(source, path, r"(?:.*/)?([^/]+)\.tar/(?:.*/)?([^/]+)", "train")
    of_class = re.compile(rf"train/([^/]+)/|{path.name}/(?:[^/]+/)*?([^/]+?)\.tar")
    matches = map(of_class.match, source.names)
    wnids = [match and (match[1] or match[2]) for match in matches]
    source.classes = sorted({wnid for wnid in wnids if wnid})
    rank = {name: label for label, name in enumerate(source.classes)}
    source.labels = array("q", (rank[wnid] if wnid else -1 for wnid in wnids))
    return require_any(source)


def _tree(root: Place, start: str, expected: str, only: str = "") -> Source:
    """All images below the entries of `root` whose names begin with `start`, sorted by path. The
    images of an archive stand where a folder of its name would. `only` is the one entry to search.
    """
    source = Source(root)
    names: list[str] = []
    reasons: dict[str, str] = {}  # apart: a pair for each name would take much memory
    for name, reason in files.bounded(
        [(only, "")] if only else walk(root, source.left, start), root
    ):
        names.append(name)
        if reason:
            reasons[name] = reason
    samples = _Samples(source.sidecars)
    for name in sorted(names):
        is_image = False
        if name in reasons:
            source.add_fault(name, reasons[name])
        elif name.lower().endswith(archives.UNREAD):
            source.add_fault(name, archives.COMPRESSED)
        elif name.lower().endswith(archives.SUFFIXES):
            chosen = (
                member._replace(name=f"{name}/{member.name}".rstrip("/"))
                for member in _members(source, root / name)
            )
            source.add_archive(Archive(root / name), sorted(files.bounded(chosen, root / name)))
        else:
            is_image = folders.is_image(name, source.left)
            source.add_files([name] * is_image)
        samples.note(name, is_image)
    if not len(source):
        raise UserError(
            f"{root}: expected {expected} ({' '.join(IMAGE_SUFFIXES)}); {files.contents(root)}"
        )
    return require_any(mark_duplicates(source) if source.containers else source)


def require_any(source: Source) -> Source:
    """Refuse a source without a good image."""
    if len(source.faults) == len(source):
        more = f" (and {len(source) - 1:,} more like it)" if len(source) > 1 else ""
        name = printable(str(source.root / source.names[0]))
        raise UserError(f"{name}: {source.faults[0]}{more}")
    return source


def mark_duplicates(
    source: Source, canonical: Callable[[str], str] = str, start: int = 0
) -> Source:
    """Mark further images of the same name as bad: unpacked, one would replace the other."""
    seen: set[str] = set()
    for position in range(start, len(source)):
        name = canonical(source.names[position])
        if name in seen:
            source.faults.setdefault(position, "duplicate path")
        seen.add(name)
    return source


class _Samples:
    """Counts files that say something of an image: 17.cls and 17.json beside 17.jpg, as in the tar
    files of WebDataset. The files of a sample follow each other.
    """

    def __init__(self, sidecars: Counter[str]) -> None:
        self.sidecars, self._key, self._image, self._waiting = sidecars, "", False, Counter[str]()

    def note(self, path: str, is_image: bool) -> None:
        """The next file. A sample's name ends at the first dot of its files' names."""
        suffix = "" if is_image else path[path.rfind(".") :].lower()
        if not is_image and suffix not in SIDECARS:
            return
        key = path[: path.find(".", path.rfind("/") + 1)]
        if key != self._key:
            self._key, self._image, self._waiting = key, False, Counter()
        if is_image:
            self._image = True
            self.sidecars.update(self._waiting)
            self._waiting.clear()
        else:
            (self.sidecars if self._image else self._waiting)[suffix] += 1
