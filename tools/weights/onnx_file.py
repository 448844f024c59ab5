"""An encoder or a whole segmenter as an ONNX file, for images of any number and size.

Letters: B images of H × W pixels, D features, K prototypes, h w cells.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import SlotCon
from model.branch import Branch
from model.encoder import AnyEncoder, Encoder
from model.grouping import cosine_scores
from model.names import Branch as BranchName
from model.timm_encoder import first_line
from pipeline.augment import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError
from train.encoders import encoder_of
from train.pretrained import load_model, read_record
from train.run.checkpoint import find
from train.weights import Backbone, describe

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference from PyTorch's output, relative to the output's largest value."""
_CELLS = ((1, 2, 3), (2, 3, 2))
"""Number, height and width in cells of the images on which the file is checked."""


class Segmenter(nn.Module):
    """Encoder, projector and prototypes: normalised images [B, 3, H, W] → (scores [B, K, h, w],
    the cosines of cells and prototypes; ids int64 [B, H, W], the best prototype of each pixel, its
    scores upsampled bilinearly).
    """

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.encoder, self.projector = branch.encoder, branch.projector
        self.prototypes = nn.Parameter(branch.grouping.prototypes.detach(), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = cosine_scores(self.projector(self.encoder(images)), self.prototypes)
        upsampled = F.interpolate(scores, images.shape[2:], mode="bilinear")
        return scores, upsampled.argmax(dim=1)


def encoder_file(backbone: Backbone) -> bytes:
    """The encoder: images [B, 3, H, W] → features [B, D, h, w] of its last stage. Raises
    UserError.
    """
    encoder = encoder_of(backbone).eval()
    return _exported(encoder, encoder, ("features",), backbone.metadata)


def segmenter_file(checkpoint: Path, branch: BranchName, metadata: dict[str, str]) -> bytes:
    """The segmenter of a run or checkpoint. Raises UserError."""
    if checkpoint.is_file():
        raise UserError(f"{checkpoint}: a file: --to onnx-segmenter needs a run or a checkpoint")
    record = read_record(find(checkpoint))
    model: SlotCon = load_model(checkpoint)[0].eval()
    network = Segmenter(getattr(model, branch)).eval()
    known = describe(record, branch) | metadata
    return _exported(network, network.encoder, ("scores", "ids"), known)


def _exported(
    network: nn.Module, encoder: AnyEncoder, outputs: Sequence[str], metadata: dict[str, str]
) -> bytes:
    """The file of a network of images, checked if onnxruntime is there. Raises UserError."""
    cell = max(encoder.strides.values())
    size = torch.export.Dim
    sides = {2: size("height"), 3: size("width")}
    if not isinstance(encoder, Encoder):  # it would be padded, by a rule that depends on the size
        sides = {2: cell * size("rows"), 3: cell * size("columns")}
    example = torch.randn(2, 3, 3 * cell, 4 * cell, generator=torch.Generator().manual_seed(0))
    try:
        with _silence():
            program: Any = torch.onnx.export(
                network,
                (example,),
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes=({0: size("batch"), **sides},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            known = {"mean": json.dumps(IMAGENET_MEAN), "std": json.dumps(IMAGENET_STD)}
            known |= {"cell": str(cell)} | metadata
            program.model.metadata_props.update(known)
            content: bytes = program.model_proto.SerializeToString()
    except ImportError as error:
        raise UserError(f"--to onnx needs pip install slotstream[onnx] ({error})") from None
    except Exception as error:  # of the exporter: it has no type of its own for what it cannot do
        raise UserError(f"--to onnx: this network cannot be written: {first_line(error)}") from None
    _check(content, network, cell)
    return content


def _check(content: bytes, network: nn.Module, cell: int) -> None:
    """Compare the file with the network on images of other sizes. Raises UserError."""
    try:
        import onnxruntime
    except ImportError:
        print("note: onnxruntime is missing: the file is not compared with PyTorch")
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for seed, (count, rows, columns) in enumerate(_CELLS):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, rows * cell, columns * cell, generator=generator)
        with torch.no_grad():
            expected = network(images)
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = session.run(None, {"images": images.numpy()})[0]
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float(np.abs(found - expected.numpy()).max()) / scale)
    if not worst <= TOLERANCE:
        raise UserError(f"--to onnx: onnxruntime's output differs from PyTorch's by {worst:.2g}")
    print(f"onnxruntime {onnxruntime.__version__}: differs from PyTorch by {worst:.1g} at most")


@contextlib.contextmanager
def _silence() -> Any:
    """Without the exporter's progress and its warnings about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
