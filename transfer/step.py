"""What training and evaluation need of a model before and in a step."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from train.run.launch import to_device
from train.run.watchdog import Watchdog
from transfer.config import TransferConfig


def place(model: nn.Module, config: TransferConfig, accelerator: Accelerator) -> nn.Module:
    """`model` on this process's device, in the memory layout of the configuration."""
    layout = torch.channels_last if config.efficiency.channels_last else torch.preserve_format
    return to_device(model, accelerator).to(memory_format=layout)


def beat_in_forward(model: nn.Module, watchdog: Watchdog) -> None:
    """Each forward of `model`, in training and in evaluation, reports progress to `watchdog`."""
    first = next(layer for layer in model.modules() if not any(layer.children()))
    first.register_forward_hook(lambda *_: watchdog.beat())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for the random numbers that a model draws in `step`."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
