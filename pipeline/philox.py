"""Philox4x32-10, a counter-based random generator: 128 bits of counter and 64 bits of key give 128
random bits, with no state between calls. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
3", SC 2011.

`pipeline.views` caches a compiled kernel that contains this file: touch it after a change here.
"""

from typing import Any

import numpy as np
from numba import njit

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint32(0x9E3779B9)
_WEYL_1 = np.uint32(0xBB67AE85)
_HIGH = np.uint64(32)


@njit(nogil=True, cache=True)
def philox4x32(
    c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32, k0: np.uint32, k1: np.uint32
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """Four random words from counter (c0, c1, c2, c3) and key (k0, k1); all of them uint32."""
    for _ in range(10):
        product_0 = np.uint64(c0) * _MULTIPLIER_0
        product_1 = np.uint64(c2) * _MULTIPLIER_1
        c0 = np.uint32(product_1 >> _HIGH) ^ c1 ^ k0
        c1 = np.uint32(product_1)
        c2 = np.uint32(product_0 >> _HIGH) ^ c3 ^ k1
        c3 = np.uint32(product_0)
        k0 = np.uint32(k0 + _WEYL_0)
        k1 = np.uint32(k1 + _WEYL_1)
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


def philox4x32_arrays(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> tuple[Any, ...]:
    """The same words as whole-array operations. The counter's words are int64 arrays of NumPy or
    Torch (which has no unsigned ones) that broadcast with each other, or integers; so are the
    results. A product that overflows wraps, and its bits are those of the unsigned one.
    """
    word = 0xFFFFFFFF
    for _ in range(10):
        product_0, product_1 = c0 * int(_MULTIPLIER_0), c2 * int(_MULTIPLIER_1)
        c0, c1 = ((product_1 >> 32) & word) ^ c1 ^ k0, product_1 & word
        c2, c3 = ((product_0 >> 32) & word) ^ c3 ^ k1, product_0 & word
        k0, k1 = (k0 + int(_WEYL_0)) & word, (k1 + int(_WEYL_1)) & word
    return c0, c1, c2, c3
