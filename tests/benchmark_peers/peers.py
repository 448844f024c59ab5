"""The peers by name: what each is, and the function that makes its views.

Nothing heavy is imported here: a turn's time to its first batch begins before its imports.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Views = Iterator[tuple["Tensor", "Tensor"]]
"""Without end: view 1 and view 2 of B images, float32 [B, 3, S, S] each, normalised, on the
device."""


@dataclass(frozen=True)
class Job:
    """What a turn measures; every peer gets the same files and the same recipe."""

    peer: str
    files: str
    """Folder of JPEG files."""
    beton: str
    """The same files, packed by slotstream."""
    tiles: str
    """The same files, packed with --tiles."""
    views: dict[str, Any]
    """The fields of ViewConfig."""
    batch: int
    threads: int
    """Threads or worker processes; the turn may use as many cores."""
    device: str
    warm_up: float
    """Seconds before the timed part."""
    seconds: float
    """Of the timed part; 0 = end after the first batch."""

    @property
    def recipe(self) -> SimpleNamespace:
        """`views` with names as attributes; ranges and pairs are tuples again after JSON."""
        pairs = {k: tuple(v) if isinstance(v, list) else v for k, v in self.views.items()}
        return SimpleNamespace(**pairs)


@dataclass(frozen=True)
class Peer:
    """A way to make views."""

    module: str
    """In this folder; its `open_views(job, **options)` gives `Views`."""
    about: str
    options: dict[str, str]
    geometry: bool = False
    """Whether a batch says which part of one view lies where in the other."""


def _ours(about: str, **options: str) -> Peer:
    return Peer("slotstream", about, options, geometry=True)


PEERS: dict[str, Peer] = {
    "slotstream": _ours("slotstream's loader with its default settings"),
    "slotstream-tiles": _ours("the same, from a beton packed with --tiles", data="tiles"),
    "slotstream-kornia": _ours("Kornia crops and colours", crops="device", backend="kornia"),
    "slotstream-reference": _ours(
        "PIL crops and colours, on one thread", crops="device", backend="reference"
    ),
    "slotstream-dali": _ours("DALI decodes and crops", crops="dali", backend="compiled"),
    "authors": Peer(
        "authors", "SlotCon's transforms by PIL, in worker processes", {}, geometry=True
    ),
    "torchvision": Peer("torchvision_v2", "transforms v2 on tensors, in worker processes", {}),
    "lightly": Peer(
        "lightly_byol", "LightlyDataset and BYOLTransform (bilinear), in worker processes", {}
    ),
    "dali": Peer("nvidia_dali", "a plain pipeline; the colours in one color_twist", {}),
    "ffcv": Peer(
        "ffcv_loader", "its loader decodes and crops (areas) each view; Kornia colours a batch", {}
    ),
}
"""In the order of the table. The first one is what the others are compared with."""


def open_views(job: Job) -> Views:
    """The views of the job's peer. Raises ImportError if it is not installed."""
    peer = PEERS[job.peer]
    opened: Callable[..., Views] = import_module(f"tests.benchmark_peers.{peer.module}").open_views
    return opened(job, **peer.options)
