"""SlotCon (Wen et al., NeurIPS 2022, arXiv 2205.15288) on ResNets and timm's networks.

The network is imported when it is first named: a configuration, and so --help of every command,
needs `ModelConfig` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig

if TYPE_CHECKING:
    from model.efficiency import prepare
    from model.objective import ModelOutput
    from model.slotcon import SlotCon

__all__ = ["ModelConfig", "ModelOutput", "SlotCon", "prepare"]

_MODULES = {
    "prepare": "efficiency",
    "ModelOutput": "objective",
    "SlotCon": "slotcon",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
