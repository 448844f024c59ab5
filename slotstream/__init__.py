"""SlotCon pre-training, built around its data path, from Python.

    import slotstream

    slotstream.pack("photos", "photos.beton")              # images into one file
    loader = slotstream.Loader("photos.beton", 64)         # its views, for a training loop of yours
    run = slotstream.pretrain("photos.beton", "runs/one", "coco_r50_800ep")
    model = slotstream.load(run)                           # features and segments of images
    slotstream.evaluate(run, images="images", labels="labels")

Bad input raises `UserError`, whose text is the line that a command prints. PyTorch is imported when
the first name that needs it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.source import Batch
    from slotstream.calls import evaluate, pack, pretrain
    from slotstream.loader import Loader
    from slotstream.models import Model, load

__all__ = ["Batch", "Loader", "Model", "UserError", "evaluate", "load", "pack", "pretrain"]

_PLACES = {
    "Loader": "loader", "Batch": "loader", "Model": "models", "load": "models",
    "evaluate": "calls", "pack": "calls", "pretrain": "calls",
}  # fmt: skip
"""The module of each name; imported when it is first named."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
