"""The machine and the versions behind a number; files that are written whole or not at all."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

PACKAGES = (
    "torch", "torchvision", "numpy", "numba", "pillow", "turbojpeg", "ffcv", "kornia", "triton",
    "accelerate", "nvidia-dali-cuda120", "nvidia-dali-cuda130",
)  # fmt: skip


def hardware() -> dict[str, Any]:
    """This machine: CPU model, cores this process may use, memory in GiB, GPUs by name."""
    import torch  # a second, which --help of the commands does not wait for

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
    }


def cpu_name() -> str:
    """The processor's marketing name if Linux knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    import torch

    known = {"python": platform.python_version()}
    if torch.cuda.is_available():
        known["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


def provenance() -> dict[str, Any]:
    """`hardware`, `versions` and `command` of the running process. Each JSON file of a measurement
    begins with them.
    """
    program, *words = sys.orig_argv
    if words and Path(words[0]).name == "slotstream":  # the console script, which Python runs
        program, *words = words
    command = [Path(program).name, *words]
    return {"hardware": hardware(), "versions": versions(), "command": shlex.join(command)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` at once or not at all. Raises UserError."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` at once or not at all; to a device or a pipe, directly. Raises
    UserError.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write. At the end of the `with` it becomes `path`; after an error it is deleted.
    Raises UserError if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill. At the end of the `with` it becomes `path`; after an error it is deleted.

    Raises UserError if `path` exists and is not an empty folder, or cannot be written.
    """
    empty = path.name and path.is_dir() and not any(path.iterdir())  # "." has no name
    if path.exists() and not empty:
        raise UserError(f"{path}: is there already: give the name of a new folder")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
