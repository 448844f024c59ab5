"""Names that a configuration chooses from, in a separate module, so that reading a configuration
loads no native library.
"""

from typing import Literal, get_args

Order = Literal["random", "quasi-random", "sequential"]
"""random: any order is possible. quasi-random: images are shuffled within windows of the file, for
a set larger than memory, see `pipeline.order.block_order`. sequential: in the order of the file."""
ORDERS: tuple[str, ...] = get_args(Order)

Crops = Literal["device", "host", "dali"]
"""Where both crops are cut: on the device, from whole images; on the decoding threads (host); by
DALI, which then also decodes."""
CROPS: tuple[Crops, ...] = get_args(Crops)
AnyCrops = Literal["auto", Crops]
"""auto: what `pipeline.loader.choose` takes for the backend and the device."""

OnCorrupt = Literal["stop", "replace"]
"""What happens at a record that cannot be decoded: an error, or another image replaces it."""

WHITEN = 0.25
"""Whitening multiplies features by covariance^-this, unless another power is given."""

BACKENDS = ("reference", "compiled", "kornia", "triton")
"""The modules of `pipeline.augment` that make the views' pixels."""
