"""Settings of all tests: one thread for each library; tests marked `cuda` need a GPU."""

import os

# Set before torch and numpy load, and inherited by every command that a test starts. Parallel
# reductions change the last bits of a sum, and the tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Numba's TBB layer hangs the interpreter at exit after a fork.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")

import hypothesis
import pytest
import torch

# The first example of a property often compiles code, so its time means nothing.
hypothesis.settings.register_profile("slotstream", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("slotstream")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, except from `pytest -m cuda`. Two processes of a test cannot share a GPU
    (NCCL refuses), and results on a GPU are not equal bit for bit.
    """
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` where no GPU is seen."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and `pytest -m cuda`")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
