"""What peers with PyTorch's DataLoader share: workers without end, the copy to the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from tests.benchmark_peers.peers import Job, Views

WITHOUT_END = 1 << 40
"""Images of an epoch: workers would start anew with each."""


class Files(Dataset[Any]):
    """The JPEG files of a folder, each through `load`."""

    def __init__(self, folder: str, load: Callable[[str], Any]) -> None:
        self.paths = sorted(str(path) for path in Path(folder).iterdir())
        self.load = load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        return self.load(self.paths[i])


def load_views(job: Job, dataset: Any) -> Views:
    """The dataset's items are tuples that begin with the two views."""
    on_gpu = job.device == "cuda"
    loader = DataLoader(
        dataset,
        job.batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=WITHOUT_END),
        num_workers=job.threads,
        pin_memory=on_gpu,
    )
    for first, second, *_ in loader:
        yield (
            first.to(torch.device(job.device), non_blocking=on_gpu),
            second.to(torch.device(job.device), non_blocking=on_gpu),
        )
