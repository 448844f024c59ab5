"""Work on threads, in order, and how far it is."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map` on threads: results in the order of `items`, with at most 4 a worker in memory."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def progress(what: str, total: int, unit: str = "img", done: int = 0) -> "tqdm[None]":
    """A bar on a terminal; in a log file a line each half a minute, if it takes that long."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    delay = 0.0 if sys.stderr.isatty() else pause
    return tqdm(
        desc=what, total=total, initial=done, unit=unit, mininterval=pause, delay=delay,
        maxinterval=2 * pause,
    )  # fmt: skip
