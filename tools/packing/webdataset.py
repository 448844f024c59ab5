"""WebDataset: tar files in which the files of a sample follow each other, `17.jpg` and `17.cls`."""

from array import array
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from pipeline import folders
from pipeline.errors import BadImage, UserError, printable
from pipeline.formats import IMAGE_SUFFIXES
from pipeline.images import Limits
from tools.packing import archives, files
from tools.packing.archives import Archive, Member
from tools.packing.lists import ranked
from tools.packing.shards import add_shards, find_shards
from tools.packing.sources import Source, mark_duplicates

SUFFIX = ".tar"
LABEL = "cls"
_MAX_LABEL = Limits(max_bytes=1 << 10)


def webdataset(root: Path, image: str | None = None, label: str | None = None) -> Source:
    """WebDataset: tar files of samples KEY.jpg and KEY.cls, as img2dataset writes them too.

    ROOT is a file, a folder of shards, or a pattern such as 'DIR/shard-{000000..000099}.tar'. The
    images have the order of the shards' names and of the samples in them. `image` names the ending
    of the images, where samples have several; `label` that of the labels, by default cls. If all
    labels are whole numbers, they are kept; else the label is the rank of the name.
    """
    base, pattern = find_shards(root, SUFFIX)
    source = Source(base)
    labels: list[str | None] = []

    def add(path: Path, name: str) -> None:
        shard = Archive(path)
        reader = _Labels(shard)
        samples = files.bounded(_samples(source, shard, image, label or LABEL), path)
        chosen = []
        for member, of_label in samples:
            text, fault = reader.read(of_label)
            chosen.append(member._replace(
                name=f"{name}/{member.name}".rstrip("/"), fault=member.fault or fault
            ))  # fmt: skip
            labels.append(text)
        reader.close()
        source.add_archive(shard, chosen)

    add_shards(source, pattern, SUFFIX, add)
    _label(source, labels, label)
    return mark_duplicates(source)


class _Sample(NamedTuple):
    """The files of one key, by ending."""

    key: str
    files: dict[str, Member]


def _samples(
    source: Source, shard: Archive, image: str | None, label: str
) -> Iterator[tuple[Member, Member | None]]:
    """The image and the label of each sample, and the faults of the shard and of archives in it.
    Raises UserError if a sample has several images.
    """
    known = archives.members(shard.path)
    for key, members in groupby(known, lambda one: "" if one.fault else _split(one.name)[0]):
        if not key:
            yield from ((member, None) for member in members if _is_fault(member))
            continue
        sample = {_split(member.name)[1]: member for member in members}
        images = [end for end in sample if (end == image if image else f".{end}" in IMAGE_SUFFIXES)]
        for ending in sample.keys() - {*images[:1], label}:
            source.left[f".{ending}"] += 1
        if len(images) > 1:
            shown = " or ".join(map(printable, images))
            raise UserError(
                f"{shard}: {printable(key)}: several images in a sample: choose one with --image,"
                f" {shown}"
            )
        if images:
            yield sample[images[0]], sample.get(label)
        elif label in sample:
            source.left[f".{label} without an image"] += 1
