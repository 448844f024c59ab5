"""A progress bar."""

import sys

from tqdm import tqdm


def progress(title: str, total: int, unit: str = "img", done: int = 0) -> "tqdm[None]":
    """A bar on a terminal. In a log file a line every 30 seconds, the first after 30 seconds."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    delay = 0.0 if sys.stderr.isatty() else pause
    return tqdm(
        desc=title, total=total, initial=done, unit=unit, mininterval=pause, delay=delay,
        maxinterval=2 * pause,
    )  # fmt: skip
