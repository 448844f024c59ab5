"""Files of torch.save, of both kinds: every tensor lies in its storage."""

import io
import zipfile
from pathlib import Path

import torch

from tests.fuzz.damage import NUMBERS, Random, damage
from tests.fuzz.readers import pickle


class Target(pickle.Target):
    """Archives and rows of pickles, and the code that alters and reads them."""

    suffix = ".pth"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        base = torch.arange(12.0)
        content = {
            "state_dict": {
                "conv1.weight": base.reshape(3, 4).t(), "part": base[3:7], "half": base.half(),
                "wide": torch.ones(1).expand(3), "bool": torch.tensor([True]),
                "parameter": torch.nn.Parameter(torch.ones(2)),
                "u16": torch.ones(2).to(torch.uint16),
            },
            "epoch": 3, "device": torch.device("cpu"), "size": torch.Size([1, 2]),
        }  # fmt: skip
        self.contents = []
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            self.contents.append(buffer.getvalue())

    def altered(self, content: bytes, random: Random) -> bytes:
        if random.integers(4) == 0:
            return damage(content, random)
        if content[:2] == b"PK":
            return _archive(content, random)
        # the third pickle is that of the content: the first two and the machine's are short
        starts = [at for at in range(len(content)) if content.startswith(b"\x80\x02", at)]
        begin, end = starts[3], starts[4]
        return content[:begin] + pickle.program(content[begin:end], random) + content[end:]


def _archive(content: bytes, random: Random) -> bytes:
    """The archive with another pickle or other records, stored or deflated."""
    buffer, method = io.BytesIO(), int(random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        names = old.namelist()
        struck = names[random.integers(len(names))] if random.integers(3) == 0 else "data.pkl"
        for name in names:
            data = old.read(name)
            if name.endswith("data.pkl") and struck == "data.pkl":
                data = _sizes(data, random) if random.integers(2) else pickle.program(data, random)
            elif name == struck:
                match random.integers(3):
                    case 0:
                        continue
                    case 1:
                        data = damage(data, random)
                    case 2:
                        data = b"big" if name.endswith("byteorder") else data * 2
            new.writestr(name, data)
    return buffer.getvalue()


def _sizes(data: bytes, random: Random) -> bytes:
    """Other numbers in shapes, strides, offsets and sizes."""
    pieces = pickle._pieces(data)
    places = [at for at, piece in enumerate(pieces) if piece[:1] in (b"K", b"M", b"J")]
    for at in random.choice(places, int(random.integers(1, 4))):
        value = (
            NUMBERS[random.integers(len(NUMBERS))] if random.integers(2) else random.integers(14)
        )
        sign = -1 if random.integers(4) == 0 else 1
        pieces[at] = b"\x8a\x09" + (sign * int(value)).to_bytes(9, "little", signed=True)
    return b"".join(pieces)
