"""Work on threads, with results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int = 4
) -> Iterator[R]:
    """`map` on threads: results in the order of `items`, at most `ahead` per worker in memory."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
