"""What a configuration may choose by name; apart, so that reading one loads no native library."""

from typing import Literal, get_args

Order = Literal["random", "quasi-random", "sequential"]
"""random: every image can come at any place. quasi-random: images are shuffled within windows of
the file, see `pipeline.order.block_order`; for a set larger than memory. sequential: as they lie in
the file."""
ORDERS: tuple[str, ...] = get_args(Order)

Crops = Literal["device", "host", "dali"]
"""Where both crops are made: on the device, from whole images; on the threads that decode; by DALI,
which then decodes as well."""
CROPS: tuple[Crops, ...] = get_args(Crops)

OnCorrupt = Literal["stop", "replace"]
"""What becomes of a record that cannot be decoded: an error, or another image in its place."""
