"""WebDataset: tar files in which the files of a sample follow each other, `17.jpg` and `17.cls`."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing

from pipeline import folders
from pipeline.errors import BadImage, UserError, printable
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.images import Limits
from tools.packing import archives, files
from tools.packing.archives import Archive, Member, OpenArchive
from tools.packing.lists import ranked
from tools.packing.places import Place
from tools.packing.shards import add_shards, find_shards
from tools.packing.sources import Source, mark_duplicates

SUFFIX = ".tar"
LABEL = "cls"
_FAULT = "/"
"""In place of an ending, which has no slash."""
_KEY = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)
"""Of a file's path: the key of its sample, up to the first dot of its name, and its ending."""
_LABEL_LIMITS = Limits(max_bytes=1 << 10)
_JSON_LIMITS = Limits(max_bytes=1 << 20)


def webdataset(root: Place, image: str | None = None, label: str | None = None) -> Source:
    """WebDataset: tar files of samples KEY.jpg and KEY.cls, as img2dataset writes them too.

    ROOT is a file, a folder of shards, or a pattern such as 'DIR/shard-{000000..000099}.tar'. The
    images have the order of the shards' names and of the samples in them. `image` names the ending
    of the images, where a sample has several; `label` that of the labels, by default cls; json:a.b
    is the value of b in a of KEY.json. If all labels are whole numbers, they are kept; else the
    label is the rank of the name.
    """
    label, _, inner = (label or "").partition(":")
    keys = inner.split(".") if inner else []
    image, label = (name and name.lower().removeprefix(".") for name in (image, label))
    base, pattern = find_shards(root, SUFFIX)
    source = Source(base)
    labels: list[str] = []

    def add(path: Place, name: str) -> None:
        shard = Archive(path)
        chosen = []
        for member, text in files.bounded(
            _samples(source, shard, image, label or LABEL, keys), path
        ):
            chosen.append(member._replace(name=f"{name}/{member.name}".rstrip("/")))
            labels.append(text)
        source.add_archive(shard, chosen)

    add_shards(source, pattern, SUFFIX, add)
    if any(labels):
        _add_labels(source, labels, label or LABEL)
    elif label:
        raise UserError(f"{root}: no sample has a file KEY.{label}")
    return mark_duplicates(source)


def _samples(
    source: Source, shard: Archive, image: str | None, label: str, keys: Sequence[str]
) -> Iterator[tuple[Member, str]]:
    """The image and the label of each sample, and the faults of the shard and of archives in it.
    Raises UserError if a sample has several images.
    """
    try:
        archive = shard.open()
    except OSError as error:
        yield Member("", fault=error.strerror or str(error)), ""
        return
    with closing(archive):  # headers and labels by one file: behind a URL its blocks are read once
        for sample in _grouped(archive, source.left):
            if _FAULT in sample:
                yield sample[_FAULT], ""
                continue
            images = [one for one in sample if _is_image(one, image)]
            if len(images) > 1:
                key = printable(sample[images[0]].name)
                raise UserError(
                    f"{shard}: {key}: its sample has several images: choose one with"
                    f" --image, {' or '.join(map(printable, images))}"
                )
            for ending in sample.keys() - {label, *images}:
                source.left[f".{ending}"] += 1
            if not images:
                source.left["samples without an image"] += 1
                continue
            member, text = sample[images[0]], ""
            if label in sample and not member.fault:
                text, fault = _text(archive, sample[label], keys)
                member = member._replace(fault=fault)
            yield member, text


def _is_image(ending: str, chosen: str | None) -> bool:
    return ending == chosen if chosen else f".{ending}" in IMAGE_SUFFIXES


def _grouped(archive: OpenArchive, left: folders.Left) -> Iterator[dict[str, Member]]:
    """The files of each sample by their ending. A fault of the archive, or of one in it, has the
    ending `_FAULT`.

    As the package webdataset does, files without a dot are left out, and a sample ends where
    another key begins. A second file of one name begins another sample, a duplicate.
    """
    sample: dict[str, Member] = {}
    current = ""
    for member in archive.members():
        if not member.name or (member.fault and archives.is_archive(member.name)):
            yield from (sample, {_FAULT: member}) if sample else ({_FAULT: member},)
            sample = {}
        elif reason := folders.why_left_aside(member.name):
            left[reason] += 1
        elif not (match := _KEY.fullmatch(member.name)):
            left["of other names"] += 1
        else:
            key, ending = match[1], match[2].lower()
            if sample and (key != current or ending in sample):
                yield sample
                sample = {}
            current = key
            sample[ending] = member
    if sample:
        yield sample


def _text(archive: OpenArchive, member: Member, keys: Sequence[str]) -> tuple[str, str]:
    """The content of a label's file, or the value below `keys` of its JSON, and why it cannot be
    used, or "".
    """
    fault, text = member.fault, ""
    try:
        if not fault:
            limits = _JSON_LIMITS if keys else _LABEL_LIMITS
            data = archive.read(member.offset, member.size, member.crc, limits)
            text = _value(data, keys) if keys else data.decode().strip()
            fault = "" if text else "empty"
    except BadImage as error:
        fault = str(error)
    except UnicodeDecodeError:
        fault = "no text"
    return text, fault and f"its label in {printable(member.name)}: {fault}"


def _value(data: bytes, keys: Sequence[str]) -> str:
    """The name or whole number below `keys` in a JSON document. Raises BadImage."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise BadImage("no JSON") from None
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise BadImage(f"no {printable('.'.join(keys))}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadImage(f"{printable('.'.join(keys))} is no name and no whole number")
    return str(value).strip()


def _add_labels(source: Source, labels: list[str], ending: str) -> None:
    """Set the labels of the images. An image without one is a fault, with the label -1."""
    for i, text in enumerate(labels):
        if not text:
            source.faults.setdefault(i, f"no label: its sample has no .{ending}")
    source.labels, source.classes = ranked(str(source.root), labels)
