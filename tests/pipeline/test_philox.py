"""The generator of random words must be Philox exactly: another implementation, for example on a
GPU, needs the same numbers.
"""

import numpy as np
import pytest

from pipeline.draws import philox4x32

# Random123's published known-answer vectors for philox4x32-10: counter, key, output.
VECTORS = {
    "zeros": (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_known_answers(name: str) -> None:
    """With a wrong constant, round count or word order the output still looks random."""
    counter, key, expected = VECTORS[name]
    words = philox4x32(*map(np.uint32, counter), *map(np.uint32, key))
    assert tuple(map(int, words)) == expected
