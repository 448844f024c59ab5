"""What a run has learnt, for images in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.datasets.squares import normalise
from evaluation.features import of_encoder
from evaluation.segment import assign
from model import SlotCon
from model.encoder import AnyEncoder
from pipeline.errors import UserError
from slotstream.arguments import device_of, path_of
from train.config import RunConfig
from train.encoders import encoder_of, read_encoder
from train.pretrained import load_model

Images = np.ndarray | Tensor | Sequence[Any]
"""uint8 [B, H, W, 3] RGB, in an array, a tensor, or a list of arrays or PIL images of one size; or
float32 [B, 3, H, W], normalised like the views of a loader."""


@dataclass(frozen=True)
class Model:
    """A pre-trained encoder, and its prototypes if the file has them, in eval mode.

    Images may have any size from a cell on; they are not scaled. A cell of stage 4 has 32 pixels a
    side, and each stage before it half of that.
    """

    encoder: AnyEncoder
    """The network up to its last feature map."""
    slotcon: SlotCon | None
    """The whole model of a run; None for a file of weights, which has no prototypes."""
    config: RunConfig | None
    """Of the run."""
    device: torch.device

    def features(self, images: Images, stage: str | int | None = None) -> Tensor:
        """float32 [B, D, h, w]: the map of a stage, 1 to 4, or of several that are joined ("3+4");
        of the last one by default. Raises UserError for images that are none.

        >>> import numpy, slotstream
        >>> model = slotstream.load("runs/one", device="cpu")
        >>> images = numpy.zeros((2, 64, 96, 3), numpy.uint8)
        >>> model.features(images).shape
        torch.Size([2, 512, 2, 3])
        >>> model.features(images, stage=2).shape
        torch.Size([2, 128, 8, 12])
        """
        read = of_encoder("images", self.encoder).read(None if stage is None else str(stage))
        return read(self._normalised(images)).clone()  # of inference mode's, nothing can be learnt

    def segment(self, images: Images) -> Tensor:
        """int64 [B, H, W]: the prototype, 0 to K - 1, to which each pixel belongs: the one with the
        highest score, upsampled bilinearly from the last stage, as `slotstream evaluate` does.
        Raises UserError for a file of weights.

        >>> import numpy, slotstream
        >>> model = slotstream.load("runs/one", device="cpu")
        >>> segments = model.segment(numpy.zeros((2, 64, 96, 3), numpy.uint8))
        >>> segments.shape, bool((segments < model.config.model.num_prototypes).all())
        (torch.Size([2, 64, 96]), True)
        """
        if self.slotcon is None:
            raise UserError("a file of weights has no prototypes to segment by: load a run")
        pixels = self._normalised(images)
        with torch.inference_mode():
            scores, _ = self.slotcon.segment(pixels)
            return assign(scores.float(), (pixels.shape[2], pixels.shape[3])).clone()

    def _normalised(self, images: Images) -> Tensor:
        """float32 [B, 3, H, W] on the device. Raises UserError."""
        if not isinstance(images, np.ndarray | Tensor):
            arrays = [np.asarray(image) for image in images]
            if len({array.shape for array in arrays}) != 1:
                raise UserError("images must have one size: give those of each size apart")
            images = np.stack(arrays)
        tensor = torch.as_tensor(images).to(self.device)
        shape = tuple(tensor.shape)
        if tensor.dtype == torch.uint8 and len(shape) == 4 and shape[3] == 3:
            return normalise(tensor)
        if tensor.is_floating_point() and len(shape) == 4 and shape[1] == 3:
            return tensor.float().contiguous(memory_format=torch.channels_last)
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"images must be uint8 [B, H, W, 3] or normalised floats [B, 3, H, W], not {kind}"
            f" {list(shape)}"
        )


def load(path: Path | str, device: torch.device | str | None = None) -> Model:
    """The teacher of a run (its newest checkpoint) or of a checkpoint; or the encoder in a file of
    weights, as `slotstream export` and others write them. On the GPU, if there is one.

    Raises:
        UserError: if there is none in it, or it is damaged.

    >>> import slotstream
    >>> slotstream.load("runs/one").config.model.arch
    'resnet18'
    """
    path, on = path_of(path), device_of(device)
    if path.is_dir() and not (path / "config.json").is_file():
        slotcon, config = load_model(path)
        slotcon = slotcon.to(on).eval()
        return Model(slotcon.teacher.encoder, slotcon, config, on)
    encoder = encoder_of(read_encoder(path, partial=True))
    return Model(encoder.to(on).eval(), None, None, on)
