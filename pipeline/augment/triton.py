"""The recipe in four passes over memory, as Triton kernels: the backend for NVIDIA GPUs.

1. `resize_across`: crop, flip, and resize the lines; `weigh` has computed the filters' weights,
   once for each view. Bytes between the directions, as Pillow has them.
2. `resize_down`: resize the columns; the jitter up to its contrast.
3. `colour`: the contrast needs the mean of the whole view at this point, so the pass before must
   end before it. For views that have contrast (four in five) this pass applies contrast, the other
   operations and grey.
4. `blur`: both directions in a tile, for views that have it. It needs the final colours of
   neighbouring pixels, so the pass before it stores them: reading 3 bytes of each costs less than
   computing the colours of twice as many pixels.

The last pass of a view solarizes, normalises and stores it.

Bytes per pixel of a view, for an output of 2 bytes: pass 1 reads the crop, 3 bytes for each of its
pixels, and writes 3 for each line of the crop and column of the view; pass 2 reads them and writes
3; pass 3 reads 3 and writes 3; pass 4 reads 3 and writes the output's 6. A view without contrast
saves 6, a view without blur 6. Neighbouring tiles read some of the same pixels, through the cache.

Memory beside the output: the lines, 3 S bytes for each line of each crop; the views between two
passes, uint8 [2 B, 3, S, S]; the weights, 8 S bytes for each pixel that the widest filter of the
batch reads, for each view. For two views of 512 COCO images that
is 0.23, 0.15 and 0.02 GB; the output has 0.31. Pixels are PIL's, byte for byte.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment import empty_views, pillow
from pipeline.augment.kernels import words as w
from pipeline.augment.kernels.blur import blur as blur_kernel
from pipeline.augment.kernels.colour import colour as colour_kernel
from pipeline.augment.kernels.resize import resize_across, resize_down, weigh
from pipeline.errors import UserError
from pipeline.views import ViewParams

# Block sizes in pixels, and warps of a program. They cause no spills on sm_80 and sm_90, see
# tests/compile_kernels.py, and are not tuned on a GPU.
WEIGH = {"num_warps": 4, "num_stages": 1}
ACROSS = {"LINES": 64, "TILE_J": 16, "COLUMNS": 16, "num_warps": 4, "num_stages": 1}
DOWN = {"TILE_I": 32, "TILE_J": 32, "num_warps": 4, "num_stages": 1}
COLOUR = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}
BLUR = {"WINDOW": 64, "num_warps": 8, "num_stages": 1}
MAX_SIGMA = 8  # of a blur: three boxes of reach 8 still leave 16 pixels of the window
EXACT = {"enable_fp_fusion": False}

_CONTRAST, _HUE = 1, 3  # numbers of operations, as in ViewParams.order


def apply(
    canvas: Tensor,
    sizes: Tensor,  # unused: a crop never reaches beyond its image
    params: ViewParams,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """See `pipeline.augment.Apply`. Raises UserError on a device without Triton."""
    with _on(device):
        canvas = canvas.to(device, non_blocking=True)
        if canvas.stride()[2:] != (3, 1):
            canvas = canvas.contiguous()
        work = _prepare(params, size, device, dtype)
        _resize(work, canvas, params)
        return _finish(work)


def colour(pixels: Tensor, params: ViewParams, device: torch.device, dtype: torch.dtype) -> Tensor:
    """See `pipeline.augment.Colour`. Raises UserError on a device without Triton."""
    with _on(device):
        pixels = pixels.to(device, non_blocking=True).contiguous()
        work = _prepare(params, pixels.shape[2], device, dtype)
        _colour(work, pixels, before_contrast=True)
        return _finish(work)


@dataclass(frozen=True)
class _Work:
    """The inputs and outputs that all passes over a batch share."""

    views: Tensor
    """[2, B, 3, S, S], the result."""
    words: Tensor
    """int32 [2 B, words of a row], the parameters."""
    sums: Tensor
    """int64 [2 B], for the means of the contrast."""
    scratch: Tensor
    """uint8 [2 B, S, S, 3], the views between two passes."""
    any_contrast: bool
    widest_box: int
    """The largest `words.BOX` of the blur; -1 if no view is blurred."""

    @property
    def size(self) -> int:
        return self.views.shape[-1]

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The kernels' common arguments."""
        return self.words, self.sums, self.scratch, self.views


def _prepare(params: ViewParams, size: int, device: torch.device, dtype: torch.dtype) -> _Work:
    batch = params.crops.shape[1]
    packed = pack(params, size)
    words = torch.from_numpy(packed)
    if device.type == "cuda":  # the host does not wait for a copy from pinned memory
        words = words.pin_memory()
    return _Work(
        views=empty_views(batch, size, device, dtype),
        words=words.to(device, non_blocking=True),
        sums=torch.zeros(2 * batch, dtype=torch.int64, device=device),
        scratch=torch.empty(2 * batch, size, size, 3, dtype=torch.uint8, device=device),
        any_contrast=bool((packed[:, w.CONTRAST_POSITION.value] < 4).any()),
        widest_box=int(packed[:, w.BOX.value].max(initial=-1)),
    )


def _resize(work: _Work, canvas: Tensor, params: ViewParams) -> None:
    size, views, device = work.size, len(work.words), canvas.device
    sides = params.crops[..., 2:] - params.crops[..., :2]
    tallest, longest = int(sides[..., 1].max(initial=1)), int(sides.max(initial=1))
    rows = 1 + -(-4 * max(longest, size) // size)
    weights = torch.empty(views, 2, rows, size, dtype=torch.int32, device=device)
    # The filter of the last line may reach `rows` lines further, with weights of zero.
    lines = torch.empty(int(sides[..., 1].sum()) + rows, 3, size, dtype=torch.uint8, device=device)
    block = triton.next_power_of_2(size)
    weigh[(2 * views,)](work.words, weights, rows, size, block, **WEIGH, **EXACT)
    grid = (views * triton.cdiv(size, ACROSS["TILE_J"]), triton.cdiv(tallest, ACROSS["LINES"]))
    resize_across[grid](
        canvas, *canvas.stride()[:2], len(canvas), work.words, weights, rows, lines, size,
        **ACROSS, **EXACT,
    )  # fmt: skip
    tiles = triton.cdiv(size, DOWN["TILE_I"]) * triton.cdiv(size, DOWN["TILE_J"])
    resize_down[(views * tiles,)](lines, weights, rows, *work.memory, size, **DOWN, **EXACT)


def _colour(work: _Work, pixels: Tensor, before_contrast: bool) -> None:
    blocks = triton.cdiv(work.size**2, COLOUR["BLOCK"])
    colour_kernel[(len(work.words) * blocks,)](
        pixels, *work.memory, work.size, BEFORE_CONTRAST=before_contrast, **COLOUR, **EXACT
    )


def _finish(work: _Work) -> Tensor:
    """The passes after the first."""
    if work.any_contrast:
        _colour(work, work.scratch, before_contrast=False)
    if work.widest_box >= 0:
        margin = 3 * (work.widest_box + 1)
        tiles = triton.cdiv(work.size, BLUR["WINDOW"] - 2 * margin) ** 2
        blur_kernel[(len(work.words) * tiles,)](*work.memory, tiles, work.size, **BLUR, **EXACT)
    return work.views


def pack(params: ViewParams, size: int) -> NDArray[np.int32]:
    """The rows of parameters that the kernels read, int32 [2 B, words]. Raises UserError."""
    order = pillow.order(params).astype(np.int32)
    is_contrast = order == _CONTRAST

    words = np.zeros((*params.sigma.shape, w.WORDS.value), np.int32)
    words[..., w.X0.value], words[..., w.Y0.value] = params.crops[..., 0], params.crops[..., 1]
    words[..., w.WIDTH.value] = params.crops[..., 2] - params.crops[..., 0]
    words[..., w.HEIGHT.value] = params.crops[..., 3] - params.crops[..., 1]
    lines = words[..., w.HEIGHT.value].reshape(-1)
    words[..., w.FIRST_LINE.value] = (np.cumsum(lines) - lines).reshape(params.sigma.shape)
    octaves = np.log2(np.maximum(words[..., w.WIDTH.value], size) / size).astype(np.int32)
    words[..., w.LOW_BITS.value] = np.maximum(12 - octaves, 7)
    words[..., w.FLIPPED.value] = params.flipped
    words[..., w.GREY.value] = params.grey
    words[..., w.SOLARIZED.value] = params.solarized
    words[..., w.ORDER.value] = order @ (1 << np.array([0, 4, 8, 12], np.int32))
    words[..., w.CONTRAST_POSITION.value] = np.where(is_contrast.any(-1), is_contrast.argmax(-1), 4)
    words[..., w.HUE.value] = pillow.hue_shift(params)
    factors = words.view(np.float32)[..., w.FACTORS.value : w.FACTORS.value + 3]
    factors[:] = params.jitter[..., :_HUE]
    if params.sigma.size and params.sigma.max() > MAX_SIGMA:
        raise UserError(
            f"the triton backend blurs with a sigma of at most {MAX_SIGMA}, not"
            f" {params.sigma.max():g}; the kornia backend with any"
        )
    columns = [w.BOX.value, w.BOX_NEAR.value, w.BOX_FAR.value]
    words[..., columns] = np.stack(pillow.boxes(params.sigma), axis=-1)
    return words.reshape(-1, w.WORDS.value)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on `device`: it uses PyTorch's current device."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if not isinstance(colour_kernel, triton.JITFunction):  # the interpreter
        return nullcontext()
    raise UserError(
        f"the triton backend needs a CUDA GPU, not the device {device}; kornia runs anywhere"
    )
