"""Compiled code that calls C libraries: kept for the next process, and calls the right library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.helpers.betons import photograph

DECODE = """
import ctypes
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
from PIL import Image

from pipeline import turbojpeg
from pipeline.turbojpeg import Decoder, decode_records

abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
for name in ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjDestroy", "pread"):
    llvmlite.binding.add_symbol(name, abort)  # another library has functions of these names
path = Path(sys.argv[1])
data, image = path.read_bytes(), np.asarray(Image.open(path))
height, width, _ = image.shape
records = np.array([[0, len(data), height, width, 0]])
decoder, canvas = Decoder(len(data)), np.zeros((1, height, width, 3), np.uint8)
with path.open("rb") as file:
    arguments = file.fileno(), records, np.array([-1])
    print(decode_records(*arguments, decoder.handle, decoder.scratch, canvas, 1))
print(np.array_equal(canvas[0], image))
print(sum(decode_records.stats.cache_hits.values()))
"""


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jpeg") / "image.jpg"
    Image.fromarray(photograph(1, 40, 56)).save(path)
    return path


def decode(jpeg: Path, **variables: str) -> list[str]:
    """What a new process prints that decodes the file with the compiled function."""
    command, env = [sys.executable, "-c", DECODE, str(jpeg)], os.environ | variables
    process = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_second_process_compiles_nothing_and_calls_our_library(jpeg: Path) -> None:
    """Without it each process compiles for seconds before its first image, or the cached code calls
    a function of the same name in another library.
    """
    assert decode(jpeg)[:2] == ["(-1, 0)", "True"]
    assert decode(jpeg) == ["(-1, 0)", "True", "1"]


def test_a_variable_that_switches_compiling_off(jpeg: Path) -> None:
    """Without it every record counts as cut short, because Python cannot call C's `pread` so."""
    assert decode(jpeg, NUMBA_DISABLE_JIT="1")[:2] == ["(-1, 0)", "True"]
