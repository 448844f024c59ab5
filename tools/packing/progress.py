"""How far a command is."""

import sys

from tqdm import tqdm


def progress(what: str, total: int, unit: str = "img", done: int = 0) -> "tqdm[None]":
    """A bar on a terminal; in a log file a line each half a minute, if it takes that long."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    delay = 0.0 if sys.stderr.isatty() else pause
    return tqdm(
        desc=what, total=total, initial=done, unit=unit, mininterval=pause, delay=delay,
        maxinterval=2 * pause,
    )  # fmt: skip
