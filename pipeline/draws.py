"""Random words from a counter, and numbers from a word: compiled code that keeps no state.

Philox4x32-10 is a counter-based random generator: 128 bits of counter and 64 bits of key give 128
random bits (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
"""

from typing import Any, NamedTuple

import numpy as np

from pipeline.compiling import njit

compiled = njit(nogil=True, cache=True)

_HIGH = np.uint64(32)


class Stream(NamedTuple):
    """Philox's input without the block number, five uint32: an image in an epoch of a run."""

    epoch: np.uint32
    index_low: np.uint32
    index_high: np.uint32
    seed_low: np.uint32
    seed_high: np.uint32


@compiled
def stream_of(seed: np.uint64, epoch: np.uint32, index: np.uint64) -> Stream:
    low, high = np.uint32(index), np.uint32(index >> _HIGH)
    return Stream(epoch, low, high, np.uint32(seed), np.uint32(seed >> _HIGH))


@compiled
def draw_block(stream: Stream, block: int) -> Any:
    """The four uint32 words of one block."""
    return philox4x32(
        np.uint32(block),
        stream.epoch,
        stream.index_low,
        stream.index_high,
        stream.seed_low,
        stream.seed_high,
    )


_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint32(0x9E3779B9)
_WEYL_1 = np.uint32(0xBB67AE85)


@compiled
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


@compiled
def unit(word: np.uint32) -> Any:
    return np.float64(word) * 2.0**-32


@compiled
def uniform(word: np.uint32, low: float, high: float) -> Any:
    return low + (high - low) * unit(word)


@compiled
def below(word: np.uint32, count: int) -> Any:
    """An integer in 0..count-1."""
    return np.int64((np.uint64(word) * np.uint64(count)) >> np.uint64(32))
