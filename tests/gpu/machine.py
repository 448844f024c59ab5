"""Writes versions, the GPU and modules that fail to import to $OUT/machine.json."""

import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "numba", "llvmlite", "accelerate", "kornia",
    "kornia_rs", "jsonargparse", "jinja2", "zlib-ng", "faster-coco-eval", "safetensors", "timm",
    "nvidia-ml-py", "pytest", "ffcv", "nvidia-dali-cuda130",
)  # fmt: skip
MODULES = (
    "pipeline.loader", "pipeline.turbojpeg", "pipeline.augment.kornia", "pipeline.augment.triton",
    "model.slotcon", "train.trainer", "tools.benchmark.measure", "tools.build_dataset",
    "transfer.trainer", "transfer.detection.task", "transfer.segmentation.task",
    "evaluation.probes.scores", "evaluation.clusters",
)  # fmt: skip


def versions() -> tuple[dict[str, str], list[str]]:
    """Version by package, and the packages that are not installed."""
    installed, missing = {}, []
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return installed, missing


def gpu() -> dict[str, Any]:
    """Name, multiprocessors and memory of the first GPU; empty without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def failed_imports() -> dict[str, str]:
    """The error of each module of ours that cannot be imported here."""
    failed = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:160]
    return failed


def main() -> None:
    """Write the file, and print the same."""
    installed, missing = versions()
    machine = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        **gpu(),
        **installed,
        "missing": missing,
        "failed imports": failed_imports(),
    }
    (Path(os.environ["OUT"]) / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    print(machine)


if __name__ == "__main__":
    main()
