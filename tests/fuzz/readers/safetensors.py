"""Files of safetensors: the library checks shapes and offsets, we check sizes and kinds."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.fuzz.damage import NUMBERS, Random, damage
from tests.fuzz.readers import pickle

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 1e300, "", "a\nb\x1b[2J", [], [[]], {}, [0, 4], [4, 0], *NUMBERS,
    "F32", "F64", "BOOL", "F8_E4M3", "F4", "C64", "O",
)  # fmt: skip


class Target(pickle.Target):
    """A file with tensors of several types, and the code that alters its header."""

    suffix = ".safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tensors = {
            "conv1.weight": torch.arange(12.0).reshape(3, 4), "half": torch.ones(3).half(),
            "bool": torch.tensor([True, False]), "number": torch.tensor(7),
            "brain": torch.ones(2).bfloat16(), "empty": torch.ones(0, 3),
        }  # fmt: skip
        self.contents = [save(tensors, {"arch": "resnet18", "run": "a"})]

    def altered(self, content: bytes, random: Random) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        match random.integers(4):
            case 0:
                return damage(content, random)
            case 1:
                size = NUMBERS[random.integers(len(NUMBERS))]
                return struct.pack("<Q", size) + content[8:]
            case 2:
                head = damage(content[8 : 8 + length], random)
            case _:
                header = json.loads(content[8 : 8 + length])
                for _ in range(int(random.integers(1, 3))):
                    _strike(header, random)
                head = json.dumps(header).encode()
        return struct.pack("<Q", len(head)) + head + content[8 + length :]


def _strike(value: Any, random: Random) -> None:
    """Change one place of a JSON value."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = places[random.integers(len(places))]
        if not isinstance(value[place], dict | list) or random.integers(3) == 0:
            break
        value = value[place]
    if random.integers(4) == 0:
        del value[place]
    else:
        value[place] = ODD[random.integers(len(ODD))]
