"""Settings of all tests: one thread for each library; tests marked `cuda` need a GPU; the order of
files on several processes."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

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


LONGEST = (
    "gpu/test_run.py",
    "train/run/test_faults.py",
    "test_benchmark_peers.py",
    "test_package.py",
)
"""Files of few tests that take half a minute of a core or more. On several processes they begin
first: one that begins last runs alone, while the other processes have nothing left to do."""
_RANK = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
assert all(map(Path.is_file, _RANK)), f"{LONGEST}: a file that is not there"


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, except from `pytest -m cuda`. Two processes of a test cannot share a GPU
    (NCCL refuses), and results on a GPU are not equal bit for bit.
    """
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files for pytest-xdist, whose --no-loadscope-reorder keeps this order: the longest,
    then those of most tests. Skip tests marked `cuda` where no GPU is seen.
    """
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (_RANK.get(item.path, len(LONGEST)), -tests[item.path]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and `pytest -m cuda`")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def no_flush() -> Iterator[None]:
    """Flushing models of 100 MB to the disk is slow; a test's files need not survive a crash."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.checkpoint._flush", lambda _: None)
        yield
