"""Exact search for the nearest of many cells.

A block of cells is multiplied with a block of queries, and a query keeps the best so far. On a CPU
most of that product is saved. By Cauchy and Schwarz

    q·k ≤ q₁·k₁ + |q₂| |k₂|

with q₁, k₁ the parts along a few directions that hold most of the cells' energy, q₂, k₂ the rest.
Only where this bound exceeds a query's k-th best so far, q·k itself is computed.

Ties: of cells with equal values the one with the lower number is nearer. On a CPU a value is one
sum, in one order, so the result is the same to the last bit for any blocks, threads and batches of
queries.

Letters: Q queries, M cells, D features, P directions, k neighbours, q and m those of a block.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from model.precision import full_precision
from pipeline.compiling import njit

Distance = Literal["cosine", "L2"]

ROWS, COLUMNS = 1024, 1024
"""Queries and cells multiplied at once on a CPU: 4 MiB of products."""
PRODUCTS = 2**24
"""Products at once on a GPU: 64 MiB."""
SAMPLE = 2**13
"""Cells that the directions are found with; fewer than four times as many are multiplied whole."""
REST = 0.15
"""Share of the cells' energy outside the P directions. If half of D do not suffice, all cells are
multiplied whole."""
REFINED = 1 / 8
"""Share of pairs up to which computing them one by one is faster than their whole product."""
EVERY = 8
"""Of so many queries one tells whether few pairs are left to compute."""
STRIDE = 32
"""Bounds compared at once."""
ROUNDING, HALF_ROUNDING = 2e-5, 1e-3
"""Added to bounds, as shares of |q| |k|: more than float32 sums and float16 directions round."""
_LAST = 2**32 - 1

_generated: Any = intrinsic  # its type takes the compiler's context for an argument of the caller
_compiled = partial(njit, nogil=True, cache=True, error_model="numpy")


class NearestCells:
    """M cells, searched without a second copy of their features."""

    def __init__(
        self,
        features: Tensor,
        *,
        distance: Distance = "cosine",
        among: Tensor | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        """
        Args:
            features: [M, D], float32 or float16; not copied, not changed.
            distance: of a query and a cell.
            among: bool [M], the cells to find; None: all.
            devices: each takes a part of the cells and searches it. None given: that of `features`.
        """
        size, devices = len(features), list(devices) or [features.device]
        ends = [size * i // len(devices) for i in range(len(devices) + 1)]
        self.parts = [
            _Part(first, features[first:end].to(device), distance, among)
            for first, end, device in zip(ends, ends[1:], devices, strict=False)
        ]
        self.findable = size if among is None else int(among.sum())
        self.cosine = distance == "cosine"

    @full_precision
    @torch.no_grad()
    def __call__(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Queries [Q, D] → float32 [Q, k], the cosines of their k = min(`count`, cells to find)
        nearest cells, or q·k - |k|²/2 for L2, in descending order; and the cells' numbers, int64
        [Q, k].
        """
        queries = F.normalize(queries) if self.cosine else queries
        count = min(count, self.findable)
        found = [
            part.search(queries.to(part.device), count).to(queries.device) for part in self.parts
        ]
        codes = found[0] if len(found) == 1 else torch.cat(found, dim=1).topk(count).values
        return decoded(codes)


class _Part:
    """Consecutive cells on one device; the first has number `first`."""

    def __init__(
        self, first: int, features: Tensor, distance: Distance, among: Tensor | None
    ) -> None:
        self.first, self.features, self.device = first, features, features.device
        # Into one tensor: many small ones between temporary blocks would fragment the memory.
        length = torch.empty(len(features), device=self.device)
        for part, block in zip(length.split(COLUMNS), features.split(COLUMNS), strict=True):
            part.copy_(torch.linalg.vector_norm(block.float(), dim=1).clamp_min(1e-12))
        self.length = length
        self.cosine = distance == "cosine"
        """The value of a pair is q·k · weight - bias."""
        self.weight = 1 / self.length if self.cosine else torch.ones_like(length)
        self.bias = torch.zeros_like(length) if self.cosine else length.square() / 2
        if among is not None:
            outside = ~among[first : first + len(features)].to(self.device)
            self.bias.masked_fill_(outside, torch.inf)

    def search(self, queries: Tensor, count: int) -> Tensor:
        """Queries [Q, D] → int64 [Q, k], the `encoded` values and numbers, in descending order."""
        if self.device.type != "cpu":
            return self._by_products(queries, count)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            chunks = queries.split(ROWS)
            return torch.cat([self._by_bounds(chunk, count, pool) for chunk in chunks])

    def _by_products(self, queries: Tensor, count: int) -> Tensor:
        """`search`, all products, by PyTorch alone: for a GPU."""
        best = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        numbers = torch.arange(len(self.features), device=self.device) + self.first
        step = max(1, PRODUCTS // max(len(queries), 1))
        for start in range(0, len(self.features), step):
            rows = slice(start, start + step)
            values = queries @ self.features[rows].float().T * self.weight[rows] - self.bias[rows]
            best = torch.cat([best, encoded(values, numbers[rows])], dim=1)
            best = best.topk(min(count, best.shape[1])).values
        return best

    def _by_bounds(self, queries: Tensor, count: int, pool: ThreadPoolExecutor) -> Tensor:
        """`search`, by bounds: for a CPU."""
        host = queries.contiguous().numpy()
        values = np.full((len(queries), count), -np.inf, np.float32)
        numbers = np.zeros((len(queries), count), np.int64)
        whole, part = with_rest(queries, queries, ROUNDING), self._projected(queries)
        products = queries.new_empty(len(queries), COLUMNS)
        skipped, skip = 0, 0  # blocks without a try of the directions, the more the more tries fail
        stored = torch.int16 if self.features.dtype == torch.float16 else torch.float32
        for start in range(0, len(self.features), COLUMNS):
            rows = slice(start, start + COLUMNS)
            cells, weight, bias = self.features[rows], self.weight[rows], self.bias[rows]
            few = False
            if part is not None and start and skipped >= skip:
                scale = (self.length[rows] * weight)[:, None]
                bounds = multiply(part, self.summary[rows].float() * scale, bias, products)
                part_of = bounds[::EVERY]
                few = above(part_of, values[::EVERY]) <= REFINED * part_of.size
                skipped, skip = 0, 0 if few else 2 * skip + 1
            if not few:
                scaled = cells.float() * weight[:, None]
                bounds = multiply(whole, with_rest(scaled, scaled, ROUNDING), bias, products)
                skipped += 1
            keys = [each.numpy() for each in (cells.view(stored), weight, bias)]
            in_threads(pool, keep_best, [bounds, host, values, numbers], start, *keys)
        return encoded(torch.from_numpy(values), torch.from_numpy(numbers) + self.first)

    def _projected(self, queries: Tensor) -> Tensor | None:
        """[Q, P + 1], queries along the directions and the length of the rest; None without."""
        if self.directions is None:
            return None
        return with_rest(queries @ self.directions, queries, HALF_ROUNDING)

    @cached_property
    def directions(self) -> Tensor | None:
        """[D, P], orthonormal; None if all cells shall be multiplied whole."""
        cells, dim = self.features.shape
        if cells < 4 * SAMPLE:
            return None
        sample = F.normalize(self.features[:: cells // SAMPLE].double())
        energy, directions = torch.linalg.eigh(sample.T @ sample / len(sample))
        rest = 1 - energy.flip(0).cumsum(0)
        count = int((rest > REST).sum()) + 1
        return directions.flip(1)[:, :count].float().contiguous() if 2 * count <= dim else None

    @cached_property
    def summary(self) -> Tensor:
        """float16 [M, P + 1] of cells of length 1: along the directions, and the rest's length."""
        assert self.directions is not None
        summary = self.features.new_empty(
            len(self.features), self.directions.shape[1] + 1, dtype=torch.float16
        )
        for rows, block in zip(summary.split(COLUMNS), self.features.split(COLUMNS), strict=True):
            unit = F.normalize(block.float())
            rows.copy_(with_rest(unit @ self.directions, unit, HALF_ROUNDING))
        return summary


def with_rest(part: Tensor, whole: Tensor, rounding: float) -> Tensor:
    """[n, P], [n, D] → [n, P + 1]: `part` and the length of the rest of `whole`. The products of
    such rows are at least those of `whole`, also with the `rounding` of a product of length 1.
    """
    squares = [vectors.square().sum(dim=1) for vectors in (whole, part)]
    rest = (squares[0] - squares[1]).clamp_min(0) + rounding * squares[0]
    return torch.cat([part, rest.sqrt()[:, None]], dim=1)


def multiply(queries: Tensor, cells: Tensor, bias: Tensor, out: Tensor) -> np.ndarray:
    """[q, P], [m, P], [m] → float32 [q, m], the products less `bias`, in the memory of `out`."""
    products = out.view(-1)[: len(queries) * len(cells)].view(len(queries), len(cells))
    torch.mm(queries, cells.T, out=products)
    if bool(bias.any()):
        products -= bias
    return products.numpy()


def in_threads(pool: ThreadPoolExecutor, kernel: Any, arrays: Sequence[Any], *same: Any) -> None:
    """Call `kernel` on `pool` with a part of the rows of `arrays` for each thread of PyTorch's."""
    parts = [np.array_split(array, torch.get_num_threads()) for array in arrays]
    list(pool.map(lambda *part: kernel(*part, *same), *parts))


@_generated
def _widened(_: Any, number: Any) -> Any:
    """A float32, or the float16 whose bits an int16 holds → float32."""

    def generate(__: Any, builder: Any, ___: Any, args: Any) -> Any:
        if number == types.float32:
            return args[0]
        half = builder.bitcast(args[0], ir.HalfType())
        return builder.fpext(half, ir.FloatType())

    return types.float32(number), generate


@_compiled(fastmath={"reassoc", "nsz"})
def _product(a: Any, b: Any) -> Any:
    """The product of two vectors. The order of its sum depends on nothing but their length."""
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * _widened(b[i])
    return total


@_compiled()
def above(bounds: Any, values: Any) -> Any:
    """How many of the bounds [q, m] exceed the last of their query's values [q, k]."""
    count = 0
    for i in range(len(bounds)):
        last = values[i, -1]
        for j in range(bounds.shape[1]):
            count += bounds[i, j] > last
    return count


@_compiled()
def keep_best(
    bounds: Any, queries: Any, values: Any, numbers: Any, start: Any, cells: Any, weight: Any,
    bias: Any,
) -> None:  # fmt: skip
    """Put cells [m, D], numbered from `start`, among the best so far of queries [q, D]: `values`
    and `numbers` [q, k], in order. Computes the values whose `bounds` [q, m] exceed the last one.
    """
    last = values.shape[1] - 1
    for i in range(len(bounds)):
        for first in range(0, len(cells), STRIDE):
            stride = bounds[i, first : first + STRIDE]
            exceeds = False
            for j in range(len(stride)):  # by vectors, before the loop that branches
                exceeds |= stride[j] > values[i, last]
            if not exceeds:
                continue
            for j in range(first, first + len(stride)):
                if bounds[i, j] > values[i, last]:
                    value = _product(queries[i], cells[j]) * weight[j] - bias[j]
                    if value > values[i, last]:
                        place = last
                        while place > 0 and values[i, place - 1] < value:
                            values[i, place] = values[i, place - 1]
                            numbers[i, place] = numbers[i, place - 1]
                            place -= 1
                        values[i, place] = value
                        numbers[i, place] = start + j


def encoded(values: Tensor, numbers: Tensor) -> Tensor:
    """float32 values and int64 numbers below 2³² → int64: of two, the code of the higher value is
    higher, of equal values that of the lower number.
    """
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order.long() << 32) | (_LAST - numbers)


def decoded(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Values and numbers of `encoded`."""
    order = (codes >> 32).int()
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.view(torch.float32), _LAST - (codes & _LAST)
