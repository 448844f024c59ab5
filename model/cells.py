"""The contrast between single cells: a term beside the authors' losses.

Every cell of the pixels that two views share is one of the same pixels in both. Pixel contrast as
in PixContrast (Xie et al., arXiv 2011.10043, section 3.1) and DenseCL (Wang et al., arXiv
2011.09157), which give no predictor; here it has the shape of the slots' predictor, and the
temperature and factor are those of the slots. B images, D features, H W cells, n of them sampled.
"""

from hashlib import blake2b

import torch
from torch import Tensor, nn

from model.distributed import all_gather, all_reduce_sum, rank
from model.losses import slot_loss
from model.slots import predict, synchronised

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of SplitMix64 (Steele et al., OOPSLA 2014)."""


def sample_cells(
    draw: tuple[int, int], images: int, cells: int, count: int, device: torch.device
) -> Tensor:
    """`count` of the `cells` of each of this rank's images, without repetition: int64 [B, n].

    They follow from `draw`, (seed, number of the batch in the run), and the image's position among
    those of all ranks alone: a resumed run, and one on another number of processes or another
    device, samples the same. No host waits for it. Raises ValueError if there are too few cells.
    """
    if count > cells:
        raise ValueError(f"a sample of {count} cells of an image: the shared pixels give {cells}")
    seed, number = draw
    state = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    first = rank() * images * cells
    position = torch.arange(first, first + images * cells, device=device)
    noise = _mixed(position * _signed(_GOLDEN) + int.from_bytes(state, signed=True))
    return noise.view(images, cells).argsort(dim=1)[:, :count]


def cell_loss(
    student: Tensor,
    teacher: Tensor,
    overlapping: Tensor,
    chosen: Tensor,
    predictor: nn.Sequential,
    temperature: float,
) -> Tensor:
    """One direction: InfoNCE between the chosen cells, a scalar.

    student, teacher [B, D, H, W]: features of one and of the other view, aligned on the shared
    pixels; overlapping bool [B]: whether there are such pixels; chosen int64 [B, n]. The positive
    of a cell is the teacher's cell in the same place, the other keys are the chosen cells of all
    images of all ranks. The rest is `slot_loss`. Without two queries the loss is zero.
    """
    valid = overlapping.repeat_interleave(chosen.shape[1], output_size=chosen.numel())
    count = valid.sum()
    if synchronised(predictor):
        count = all_reduce_sum(count)
    queries = predict(predictor, chosen_rows(student, chosen), valid, count)
    keys, valid_keys = all_gather(chosen_rows(teacher, chosen)), all_gather(valid)
    # Without any valid key the loss is dropped below; it must be finite all the same.
    valid_keys = valid_keys | ~valid_keys.any()
    positive = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    loss = slot_loss(queries, keys, positive, valid, valid_keys, temperature)
    return torch.where(count > 1, loss, 0.0)


def chosen_rows(maps: Tensor, chosen: Tensor) -> Tensor:
    """The chosen cells of [B, D, H, W]: [B·n, D]."""
    index = chosen[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, index).transpose(1, 2).flatten(0, 1)


def _mixed(value: Tensor) -> Tensor:
    """SplitMix64's output for these states, on int64: the same bits on every device."""
    value = (value ^ _shifted(value, 30)) * _signed(_FIRST)
    value = (value ^ _shifted(value, 27)) * _signed(_SECOND)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """64 bits as int64 has them."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant
