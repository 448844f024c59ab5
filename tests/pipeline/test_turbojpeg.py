"""Compiled code that calls C libraries: kept for the next process, and calls the right library."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline import turbojpeg
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


PACKAGED = """
import ctypes, io, sys
real = ctypes.CDLL
def load(name, *rest, **options):
    if name == "libturbojpeg.so.0":
        raise OSError("no such library")
    return real(name, *rest, **options)
ctypes.CDLL = load
import numpy as np
from PIL import Image
from pipeline.turbojpeg import Decoder, lib
image = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3) // 4)
stream = io.BytesIO()
image.save(stream, "JPEG")
pixels = np.empty((16, 16, 3), np.uint8)
assert not Decoder(0).decompress(stream.getvalue(), pixels)
assert np.array_equal(pixels, Image.open(stream))
assert "turbojpeg" not in sys.modules and "ffcv" not in sys.modules
print(lib._name)
"""


def test_the_package_turbojpeg_stands_in_for_the_systems_library(tmp_path: Path) -> None:
    """Without it a machine without libturbojpeg, or without root to install it, reads no beton."""
    loaded = Path("/proc/self/maps").read_text()
    ours = re.search(r"/\S*libturbojpeg\S*", loaded)
    assert ours
    (tmp_path / "turbojpeg.so").write_bytes(b"not imported")
    file = tmp_path / "turbojpeg.libs" / "libturbojpeg-0a1b.so.0.3.0"
    file.parent.mkdir()
    shutil.copy(ours[0], file)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-c", PACKAGED],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.stdout == f"{file}\n", process.stderr


def test_the_systems_library_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without it a library that gets no security fixes decodes, where one is that does; or conda's
    Python decodes with the system's.
    """
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert turbojpeg.libraries()[0] == "libturbojpeg.so.0"
    own = tmp_path / "lib/libturbojpeg.so.0"
    own.parent.mkdir()
    own.write_bytes(b"")
    assert turbojpeg.libraries()[:2] == [str(own), "libturbojpeg.so.0"]


def test_without_any_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it a traceback of ctypes names a file, and no remedy."""
    monkeypatch.setattr(turbojpeg, "libraries", lambda: ["/nothing.so"])
    with pytest.raises(ImportError, match="pip install turbojpeg"):
        turbojpeg.load_library()
