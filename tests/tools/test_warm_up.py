"""After tools.warm_up nothing is left to compile for the first batch of a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.helpers.betons import varied, write_beton

FIRST_BATCH = """
import sys

import torch

from pipeline.beton import Beton
from pipeline.loader import make_loader
from pipeline.views import ViewConfig

path, crops = sys.argv[1:]
options = dict(crops=crops, backend="compiled", device=torch.device("cpu"), seed=0)
loader = make_loader(Beton(path), ViewConfig(mask_ratio=0.3), 4, **options)
next(iter(loader.epoch(0)))
functions = {
    f"{name}.{key}": value
    for name, module in list(sys.modules.items()) if name.startswith("pipeline.")
    for key, value in vars(module).items() if hasattr(value, "stats")
}
assert sum(sum(each.stats.cache_hits.values()) for each in functions.values())
print(*(key for key, each in functions.items() if each.stats.cache_misses))
"""


@pytest.fixture(scope="module")
def warm() -> None:
    subprocess.run([sys.executable, "-m", "tools.warm_up"], cwd=ROOT, check=True)


@pytest.mark.parametrize("crops", ["device", "host"])
def test_the_first_batch_compiles_nothing(warm: None, crops: str, tmp_path: Path) -> None:
    """Without it somebody's first run waits a quarter of a minute for its first batch, although
    the installation has prepared it.
    """
    beton = write_beton(tmp_path / "photos.beton", varied(8))
    command = [sys.executable, "-c", FIRST_BATCH, str(beton), crops]
    compiled = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert compiled.stdout.split() == []
