"""The names of the commands: `python -m MODULE` in the source tree, and `slotstream NAME`, which an
installed package has alone. Help and messages say the one that was called.
"""

import re
import shlex
import sys
from typing import NamedTuple

PREFIX = __name__.removesuffix("pipeline.commands")
"""What stands before a module's name: "slotstream." in an installed package, see setup.py."""


class Command(NamedTuple):
    """A command that `python -m` runs."""

    module: str
    about: str


COMMANDS = {
    "pack": Command("tools.build_dataset", "images into one file, an FFCV beton"),
    "inspect": Command("tools.inspect_dataset", "what is in a beton; verify or extract it"),
    "train": Command("train.pretrain", "pre-train SlotCon on a beton"),
    "benchmark": Command("tools.benchmark", "throughput of each stage, and the cost of a recipe"),
    "evaluate": Command(
        "evaluation.unsupervised_segmentation", "score what a run has learnt without labels"
    ),
    "probe": Command("evaluation.probe", "score features with labels: k-NN, linear, clusters"),
    "slots": Command("evaluation.slots", "how a run uses its prototypes"),
    "pictures": Command("evaluation.pictures", "draw prototypes, groupings, features, views"),
    "embed": Command("evaluation.embed", "features of images or slots, to .npy or .parquet"),
    "segment": Command("evaluation.masks", "a mask of each image, as PNG"),
    "report": Command("tools.report", "one HTML page about a run"),
    "compare": Command("tools.compare", "one HTML page about several runs"),
    "export": Command("tools.export", "weights for torchvision, timm, detectron2 and others"),
    "import": Command("tools.import_official", "checkpoints of SlotCon's authors"),
    "transfer detection": Command("transfer.detection", "train and score Mask R-CNN"),
    "transfer segmentation": Command("transfer.segmentation", "train and score a segmenter"),
    "transfer table": Command("transfer.table", "transfer results beside the published ones"),
    "demo": Command("tools.demo", "the whole way in minutes, on generated scenes"),
    "scenes": Command("tools.packing.scenes", "a picture of the generated scenes"),
    "warm-up": Command("tools.warm_up", "compile what the first run would wait for"),
}

_NAMES = {command.module: name for name, command in COMMANDS.items()}
_CALLS = re.compile(
    rf"(?<![\w./])(python3? )?(-m )?({'|'.join(map(re.escape, _NAMES))})(?!/|\.?\w)"
)
_called = {"by name": bool(PREFIX)}


def call_by_name() -> None:
    """From now on texts name the commands as `slotstream NAME`."""
    _called["by name"] = True


def as_called(text: str) -> str:
    """`text`, in which each `python -m MODULE` of a command reads as this process was called."""
    return _CALLS.sub(_by_name, text) if _called["by name"] else text


def _by_name(call: re.Match[str]) -> str:
    python, option, module = call.groups()
    launched = "" if python else option or ""  # accelerate launch -m, torchrun -m
    return f"{launched}slotstream {_NAMES[module]}"


def arguments(command: str) -> list[str]:
    """The arguments of a process that runs `MODULE --option …`, by the same name as this one."""
    program, *words = shlex.split(as_called(f"python -m {command}"))
    return [sys.executable, *(words if program == "python" else ["-m", program, *words])]
