"""Settings of all tests: one thread for each library; tests marked `cuda` need a GPU."""

import os

# Set before torch and numpy load, and inherited by every command that a test starts. Parallel
# reductions change the last bits of a sum, and the tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# The first example of a property often compiles code, so its time means nothing.
hypothesis.settings.register_profile("slotstream", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("slotstream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `cuda` on a machine without a GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
