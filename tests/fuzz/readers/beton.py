"""Betons: each altered one is refused in one line, or read correctly, or found by --verify."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.beton import Beton
from pipeline.errors import UserError
from pipeline.ffcv_format import (
    ALLOCATION,
    DESCRIPTOR,
    HEADER,
    JPEG,
    RAW,
    TYPE_ID,
    metadata_type,
)
from pipeline.manifest import Manifest
from pipeline.turbojpeg import Decoder
from tests.helpers.manifests import write_manifest
from tools.packing.check import verify

FIELDS = ["image", "index", "label"]
METADATA = HEADER.itemsize + len(FIELDS) * DESCRIPTOR.itemsize
SAMPLE = metadata_type(FIELDS)
PAGE, IMAGES = 1 << 21, 7
HUGE = (0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
NAMES = (
    b"image",
    b"index",
    b"label",
    b"imag",
    b"imagee",
    b"",
    b"a\nb\r\x1b[2J",
    b"\xff\xfe",
    b"../",
)

Random = np.random.Generator


def write_target(folder: Path) -> Path:
    """A beton of seven small images, baseline, progressive and raw, with labels and a manifest."""
    header, content = np.zeros((), HEADER), bytearray(2 * PAGE)
    metadata, table = np.zeros(IMAGES, SAMPLE), np.zeros(IMAGES, ALLOCATION)
    end = PAGE
    for i in range(IMAGES):
        data, height, width, mode = _image(i)
        metadata[i] = ((mode, width, height, end), i, i % 2)
        table[i] = (i, end, len(data))
        content[end : end + len(data)] = data
        end += len(data)
    end += -end % 8
    header["version"], header["num_fields"], header["page_size"] = 2, len(FIELDS), PAGE
    header["num_samples"], header["alloc_table_ptr"] = IMAGES, end
    descriptors = np.zeros(len(FIELDS), DESCRIPTOR)
    for descriptor, name in zip(descriptors, FIELDS, strict=True):
        descriptor["type_id"] = TYPE_ID[name]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    head = header.tobytes() + descriptors.tobytes() + metadata.tobytes()
    path = folder / "target.beton"
    path.write_bytes(head + bytes(content[len(head) : end]) + table.tobytes())
    names = [f"train/n{i % 2}/{i}.jpg" for i in range(IMAGES)]
    write_manifest(path, names, source="imagenet", classes=["n0", "n1"])
    return path


def _image(i: int) -> tuple[bytes, int, int, int]:
    """A record: its bytes, height, width and mode."""
    height, width = 24 + 5 * i, 40 - 3 * i
    coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if i % 3 == 2:
        return image.tobytes(), height, width, RAW
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90, progressive=i % 3 == 1)
    return stream.getvalue(), height, width, JPEG


class Target:
    """A beton, its true content, and the code that damages and restores it."""

    def __init__(self, folder: Path) -> None:
        self.path = write_target(folder)
        self.content = self.path.read_bytes()
        beton = Beton(self.path)
        self.records, self.table = beton.records, beton.table
        self.truth = _read(beton)

    def regions(self) -> list[tuple[int, int]]:
        """Begin and end of the bytes of header, metadata, descriptors, records and table."""
        pointer, size = self.records[:, 0], self.records[:, 1]
        records = [(int(p), int(p + s)) for p, s in zip(pointer, size, strict=True)]
        tables = [(0, HEADER.itemsize), (METADATA, METADATA + IMAGES * SAMPLE.itemsize)]
        return [*tables, (HEADER.itemsize, METADATA), *records, (self.table, len(self.content))]

    def try_one(self, random: Random) -> str:
        return self.try_damage(DAMAGE[random.integers(len(DAMAGE))](self, random))

    def try_damage(self, mutant: bytes) -> str:
        """The outcome of the beton with this content: "refused", "read" or "found". Raises for any
        other outcome.
        """
        self._write(self.content, mutant)
        other_pages = mutant[:4] + self.content[4:8] + mutant[8:]  # readers ignore the page size
        try:
            return self._outcome(other_pages != self.content)
        finally:
            self._write(mutant, self.content)

    def _outcome(self, changed: bool) -> str:
        try:
            beton = Beton(self.path)
            intact = self._intact(beton)
            self._check_intact(beton, intact)
            same = _read(beton) == self.truth
        except UserError as error:
            assert str(self.path) in str(error) and str(error).isprintable(), repr(str(error))
            return "refused"
        problems = verify(beton, Manifest.beside(self.path), workers=1).problems
        assert bool(problems) == changed, f"verify says {problems}"
        return "read" if same else "found"

    def _intact(self, beton: Beton) -> list[int]:
        """The records of which neither the place nor a byte was changed."""
        content, same = self.path.read_bytes(), []
        for i in range(min(IMAGES, len(beton))):
            pointer, size = self.records[i, :2].tolist()
            end = pointer + size
            if np.array_equal(beton.records[i], self.records[i]) and (
                content[pointer:end] == self.content[pointer:end]
            ):
                same.append(i)
        return same

    def _check_intact(self, beton: Beton, intact: list[int]) -> None:
        """Whatever became of the other records, these decode, and no check blames them."""
        decoder = Decoder(int(beton.records[:, 1].max()))
        for i in (*range(len(beton)), *reversed(range(len(beton)))):
            canvas = np.zeros((1, beton.height[i], beton.width[i], 3), np.uint8)
            _, reason = beton.try_decode(np.array([i]), canvas, decoder)
            if i in intact:
                images = self.truth[0]
                assert not reason, f"record {i} is intact, and refused: {reason}"
                assert (canvas[0].shape, canvas[0].tobytes()) == images[i], f"record {i} differs"
        problems = dict(verify(beton, Manifest.beside(self.path), workers=1).problems)
        for i in intact:
            reason = problems.get(f"train/n{i % 2}/{i}.jpg", "")
            assert not reason or reason.startswith("its label"), f"record {i}: {reason}"

    def _write(self, old: bytes, new: bytes) -> None:
        """Write only the differences: the file has 2 MiB, the damage a few bytes."""
        with self.path.open("r+b") as file:
            file.truncate(len(new))
            common = min(len(old), len(new))
            a, b = np.frombuffer(old, np.uint8, common), np.frombuffer(new, np.uint8, common)
            if (differs := np.flatnonzero(a != b)).size:
                file.seek(differs[0])
                file.write(new[differs[0] : differs[-1] + 1])
            file.seek(common)
            file.write(new[common:])


def _read(beton: Beton) -> tuple[list[tuple[object, bytes]], list[int], list[int] | None]:
    images = [beton.decode(i) for i in range(len(beton))]
    labels = None if beton.label is None else beton.label.tolist()
    return [(image.shape, image.tobytes()) for image in images], beton.index.tolist(), labels


# --- damage: (target, generator) -> content ------------------------------------------------------


def flip_a_bit(target: Target, random: Random) -> bytes:
    content = bytearray(target.content)
    content[_somewhere(target, random)] ^= 1 << random.integers(8)
    return bytes(content)


def flip_a_bit_of_a_table(target: Target, random: Random) -> bytes:
    content = bytearray(target.content)
    begin, end = target.regions()[random.choice([0, 1, -1])]
    content[random.integers(begin, end)] ^= 1 << random.integers(8)
    return bytes(content)


def flip_a_bit_of_an_image(target: Target, random: Random) -> bytes:
    content = bytearray(target.content)
    pointer, size = target.records[random.integers(IMAGES), :2]
    content[pointer + random.integers(size)] ^= 1 << random.integers(8)
    return bytes(content)


def overwrite_bytes(target: Target, random: Random) -> bytes:
    content = bytearray(target.content)
    for _ in range(random.integers(1, 5)):
        content[_somewhere(target, random)] = random.integers(256)
    return bytes(content)


def overwrite_a_block(target: Target, random: Random) -> bytes:
    content = bytearray(target.content)
    begin = _somewhere(target, random)
    length = min(int(random.integers(1, 300)), len(content) - begin)
    content[begin : begin + length] = _block(random, length)
    return bytes(content)


def cut(target: Target, random: Random) -> bytes:
    at = random.choice([random.integers(0, METADATA + 400), _somewhere(target, random)])
    return target.content[: int(at)]


def extend(target: Target, random: Random) -> bytes:
    return target.content + _block(random, int(random.choice([1, 8, 24, 48, 1000])))


def swap_pointers(target: Target, random: Random) -> bytes:
    metadata, table = target_tables(target)
    one, other = random.choice(IMAGES, 2, replace=False)
    column = (
        metadata["f0"]["data_ptr"] if random.integers(2) else table[random.choice(["ptr", "size"])]
    )
    column[[one, other]] = column[[other, one]]
    return with_tables(target, metadata, table)


def set_a_pointer(target: Target, random: Random) -> bytes:
    """Both tables agree on a wrong pointer: in the header, over a neighbour, past the end."""
    metadata, table = target_tables(target)
    i, j = random.choice(IMAGES, 2, replace=False)
    near = int(table["ptr"][j]) + int(random.integers(-40, 41))
    offset = random.choice([0, 8, METADATA, PAGE - 1, target.table, len(target.content), near])
    metadata["f0"]["data_ptr"][i] = table["ptr"][i] = offset
    return with_tables(target, metadata, table)


def set_a_size(target: Target, random: Random) -> bytes:
    metadata, table = target_tables(target)
    i = random.integers(IMAGES)
    near = max(0, int(table["size"][i]) + int(random.integers(-30, 31)))
    table["size"][i] = HUGE[random.integers(len(HUGE))] if random.integers(2) else near
    return with_tables(target, metadata, table)


def set_a_shape(target: Target, random: Random) -> bytes:
    """Other sides and modes, some of them wrong only in the product of the sides."""
    metadata, table = target_tables(target)
    image = metadata["f0"][i := int(random.integers(IMAGES))]
    values = [0, 1, 2, 65535, int(image["width"]), int(image["height"]), random.integers(65536)]
    for name in ("width", "height"):
        if random.integers(3):
            image[name] = random.choice(values)
    if random.integers(2):
        image["mode"] = random.choice([0, 1, 2, 255])
    metadata["f0"][i] = image
    return with_tables(target, metadata, table)


def set_a_number(target: Target, random: Random) -> bytes:
    """Indices and labels."""
    metadata, table = target_tables(target)
    column = metadata[random.choice(["f1", "f2"])]
    values = [-1, 0, 1, 2, IMAGES, 2**31, 2**63 - 1, -(2**63)]
    column[random.integers(IMAGES)] = values[random.integers(len(values))]
    return with_tables(target, metadata, table)


def set_the_header(target: Target, random: Random) -> bytes:
    header = np.frombuffer(target.content, HEADER, 1).copy()
    name = random.choice(header.dtype.names)
    near = int(header[name][0]) + int(random.integers(-3, 4))
    value = HUGE[random.integers(len(HUGE))] if random.integers(2) else max(0, near)
    header[name] = value % 256 ** header.dtype[name].itemsize
    return header.tobytes() + target.content[HEADER.itemsize :]


def set_a_descriptor(target: Target, random: Random) -> bytes:
    content = bytearray(target.content)
    begin = HEADER.itemsize + int(random.integers(len(FIELDS))) * DESCRIPTOR.itemsize
    if random.integers(2):
        content[begin] = random.choice([0, 1, 2, 3, 4, 5, 255])
    if random.integers(2):
        content[begin + 1 : begin + 17] = NAMES[random.integers(len(NAMES))].ljust(16, b"\0")
    return bytes(content)


def break_a_jpeg(target: Target, random: Random) -> bytes:
    """Damage the markers, sizes or end of a JPEG."""
    content = bytearray(target.content)
    jpegs = np.flatnonzero(target.records[:, 4] == JPEG)
    pointer, size = target.records[random.choice(jpegs), :2].tolist()
    stream = content[pointer : pointer + size]
    markers = [
        at for at in range(size - 1) if stream[at] == 0xFF and stream[at + 1] not in (0, 255)
    ]
    at = int(random.choice(markers))
    match random.integers(5):
        case 0:
            stream[at + 1] = random.integers(256)  # another marker
        case 1:
            stream[at + 2 : at + 4] = random.bytes(2)[: max(0, min(2, size - at - 2))]  # its length
        case 2:
            stream[at + 4 : at + 12] = random.bytes(8)  # sizes, components, tables
        case 3:
            stream[size // 2 :] = bytes(size - size // 2)  # a sector that was not written
        case 4:
            stream[size // 2 : size // 2 + 2] = b"\xff\xd9"  # the end, too early
    content[pointer : pointer + size] = stream[:size].ljust(size, b"\0")
    return bytes(content)


def exchange_images(target: Target, random: Random) -> bytes:
    """Overwrite one record with the bytes of another, up to the shorter of both."""
    content = bytearray(target.content)
    (one, size), (other, room) = target.records[
        random.choice(IMAGES, 2, replace=False), :2
    ].tolist()
    length = min(size, room)
    content[other : other + length] = target.content[one : one + length]
    return bytes(content)


DAMAGE: tuple[Callable[[Target, Random], bytes], ...] = (
    flip_a_bit, flip_a_bit_of_a_table, flip_a_bit_of_an_image, overwrite_bytes, overwrite_a_block,
    cut, extend, swap_pointers, set_a_pointer, set_a_size, set_a_shape, set_a_number,
    set_the_header, set_a_descriptor, break_a_jpeg, exchange_images,
)  # fmt: skip


def target_tables(target: Target) -> tuple[np.ndarray, np.ndarray]:
    metadata = np.frombuffer(target.content, SAMPLE, IMAGES, METADATA).copy()
    return metadata, np.frombuffer(target.content, ALLOCATION, IMAGES, target.table).copy()


def with_tables(target: Target, metadata: np.ndarray, table: np.ndarray) -> bytes:
    data = METADATA + metadata.nbytes
    head = target.content[:METADATA] + metadata.tobytes()
    return head + target.content[data : target.table] + table.tobytes()


def _somewhere(target: Target, random: Random) -> int:
    """The offset of a byte; each part of the file is equally likely, whatever its size."""
    regions = target.regions()
    begin, end = regions[random.integers(len(regions))]
    return int(random.integers(begin, end))


def _block(random: Random, length: int) -> bytes:
    kinds = (bytes(length), b"\xff" * length, random.bytes(length))
    return kinds[random.integers(len(kinds))]
