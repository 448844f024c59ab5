"""SlotCon (Wen et al., NeurIPS 2022, arXiv 2205.15288) on torchvision's ResNets."""

from model.config import ModelConfig
from model.efficiency import prepare
from model.slotcon import ModelOutput, SlotCon

__all__ = ["ModelConfig", "ModelOutput", "SlotCon", "prepare"]
