"""Where the features of a memory are kept: on the network's device, in the machine's memory, or in
a file.

Letters: M cells, D features.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from pipeline.errors import UserError

SHARE = 0.9
"""Of the free memory, for a memory of cells; the rest is for the work."""


@dataclass(frozen=True)
class Storage:
    """How features are kept."""

    precision: torch.dtype = torch.float32
    folder: Path | None = None
    """None: in memory; else in a file there, which nobody sees and which vanishes with its user."""
    anywhere: bool = False
    """What a GPU has no room for may lie in the machine's memory."""
    whole: bool = False
    """All cells are kept: --memory sets nothing."""

    def allocate(self, cells: int, dim: int, beside: int, device: torch.device) -> Tensor:
        """Room for features [M, D], uninitialised, where `beside` bytes a cell fit beside them.
        Raises UserError if there is no such place.
        """
        place = self.place(cells, dim, beside, device)
        if self.folder:
            return self._file(self.folder, cells, dim)
        return torch.empty(cells, dim, dtype=self.precision, device=place)

    def place(self, cells: int, dim: int, beside: int, device: torch.device) -> torch.device:
        """Where `allocate` finds room. Raises UserError, with what would fit, if it finds none."""
        features = dim * self.precision.itemsize
        in_memory = beside if self.folder else beside + features
        places = [torch.device("cpu")] if self.folder else [device]
        if self.anywhere and device.type != "cpu":
            places.append(torch.device("cpu"))
        for place in places:
            if cells * in_memory <= SHARE * free_bytes(place):
                if self.folder:
                    self._require_disk(self.folder, cells * features)
                return place
        free = max(free_bytes(place) for place in places)
        raise UserError(
            f"a memory of {cells:,} cells of {dim} features needs {gib(cells * in_memory)},"
            f" {gib(free)} are free: {self._fits(int(SHARE * free) // in_memory)}" + self._smaller()
        )

    def _fits(self, cells: int) -> str:
        if self.whole:
            return f"{cells:,} cells fit; --train-list takes fewer images"
        return f"--memory {cells} fits"

    def _smaller(self) -> str:
        """What else would make it fit."""
        options = ["--memory-precision float16"] if self.precision == torch.float32 else []
        options += [] if self.folder else ["--memory-folder"]
        return f"; {' and '.join(options)} need less" if self.anywhere and options else ""

    def _require_disk(self, folder: Path, size: int) -> None:
        """Raises UserError for a folder without room, or none."""
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise UserError(f"--memory-folder {folder}: {error.strerror}") from None
        if size > free:
            raise UserError(f"--memory-folder {folder}: {gib(size)}, {gib(free)} are free")

    def _file(self, folder: Path, cells: int, dim: int) -> Tensor:
        """Room in a file. Its blocks are reserved: a write to a full disk kills the process."""
        size = cells * dim * self.precision.itemsize
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".memory-") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(
                    file.name, shared=True, size=cells * dim, dtype=self.precision
                ).view(cells, dim)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"--memory-folder {folder}: {gib(size)}: {reason}") from None


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def searching_devices(features: Tensor, device: torch.device) -> list[torch.device]:
    """The devices that search `features` for queries on `device`: where they lie, but all GPUs if
    one had no room for them and together they have.
    """
    if features.device.type == device.type:
        return [features.device]
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    part = features.nbytes / len(gpus)
    fits = all(part <= SHARE * free_bytes(gpu) for gpu in gpus)
    return gpus if fits else [features.device]
