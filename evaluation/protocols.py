"""The settings of an evaluation, and the published protocols that fix them.

Options that a protocol can fix have no default of their own. `settle` gives each the value of
`--protocol`, or the usual one. What the settings mean is said where they are used.
"""

import argparse
import sys
from collections.abc import Mapping, Set
from typing import Any, Literal, get_args

from pipeline.errors import UserError

SOURCES = {
    "picie": "janghyuncho/PiCIE c3aa029",
    "stego": "mhamilton723/STEGO eb4d6b5",
    "cause": "ByungKwanLee/Causal-Unsupervised-Segmentation ee0aa84",
    "leopart": "MkuuWaUjinga/leopart 7835701",
    "neco": "vpariza/NeCo 3932160",
    "hummingbird": "vpariza/open-hummingbird-eval 5e79da2",
    "capi": "facebookresearch/capi 98b4fa1",
}
"""Repository and commit of the evaluator that each protocol equals."""

Match = Literal["pixels", "iou", "majority", "majority-iou", "none"]
"""How clusters get their classes.

- pixels: one to one, so that as many pixels as possible match (PiCIE, STEGO, CAUSE). Clusters
  without a class are errors.
- iou: one to one, with the highest sum of IoU (Leopart, NeCo, Hummingbird). Clusters without a
  class count as class 0.
- majority: each cluster takes the class of most of its pixels (Leopart and NeCo with many clusters:
  "precision").
- majority-iou: each cluster takes the class with the highest IoU.
- none: clusters are classes.
"""
Absent = Literal["zero", "skip"]
"""Which classes count in mIoU.

- skip: those that are labelled or predicted; a class with neither is left out (PiCIE, STEGO, CAUSE,
  CAPI).
- zero: all; a class with neither has IoU 0 (Leopart, NeCo, Hummingbird).
"""
MATCHES: tuple[Match, ...] = get_args(Match)
ABSENT: tuple[Absent, ...] = get_args(Absent)

BY_COUNT = "iou with as many clusters as classes, else majority"
"""`--match` of Leopart and NeCo, who score their best number of clusters by both."""

ALL_CELLS = sys.maxsize
"""`--memory all`"""

UPSAMPLE = ("scores", "features", "cells")
"""What is upsampled to pixels: scores of cells; features, which are then normalised; or nothing,
and a pixel takes the cluster of its cell."""
KMEANS = ("greedy", "breathing", "faiss")
"""`kmeans.RECIPES`, by name."""

Settings = Mapping[str, Any]
Table = Mapping[str | None, Settings]
"""Settings by protocol. Those without a protocol are under None."""

_ONE_TO_ONE = {"match": "pixels", "absent": "skip"}
_SCORES = {"fit": "crop", "upsample": "scores", "masks": None, "flip": False}
_WHOLE_CLUSTERS = {
    "size": 448, "fit": "square", "upsample": "cells", "masks": 100, "flip": False,
    "match": BY_COUNT, "absent": "zero", "crf": False, "kmeans": "faiss", "restarts": 5,
    "standardise": True, "pca": 50, "seeds": [0, 1, 2, 3, 4],
}  # fmt: skip
_STEGO = _ONE_TO_ONE | {
    "size": 320, "fit": "crop-nearest", "upsample": "features", "masks": None, "flip": True,
    "crf": True,
}  # fmt: skip
CLUSTERS: Table = {
    None: _ONE_TO_ONE
    | _SCORES
    | {"kmeans": "greedy", "restarts": 1, "standardise": False, "pca": None, "seeds": [0]}
    | {"crf": False, "crf_temperature": None},
    "picie": _ONE_TO_ONE | _SCORES | {"size": 320, "crf": False},
    "stego": _STEGO | {"crf_temperature": 1 / 2},
    "cause": _STEGO | {"crf_temperature": 1 / 3},
    "leopart": _WHOLE_CLUSTERS,
    "neco": _WHOLE_CLUSTERS,
}
"""Of clusters that are matched to classes."""

_BY_ID = {"fit": "crop", "match": "none", "absent": "skip", "seeds": [0, 1, 2]}
KNN: Table = {
    None: _BY_ID
    | {"vote": "cells", "neighbours": [30], "temperature": 0.02, "distance": ["cosine"]}
    | {"void_as": None, "standardise": False, "memory": 100_000, "crops": False}
    | {"std": [0.229, 0.224, 0.225], "memory_precision": "float32", "memory_folder": None},
    "hummingbird": {
        "fit": "square-torch", "vote": "cells", "void_as": 0, "neighbours": [30],
        "temperature": 0.02, "distance": ["cosine"], "standardise": False, "match": "iou",
        "absent": "zero", "crops": True, "std": [0.229, 0.224, 0.255],
        "memory_precision": "float32",
    },
    "capi": {
        "size": 224, "fit": "square-bicubic", "vote": "pixels", "void_as": None,
        "neighbours": [1, 3, 10, 30], "distance": ["cosine", "L2"], "standardise": True,
        "match": "none", "absent": "skip", "memory": ALL_CELLS, "crops": False,
        "std": [0.229, 0.224, 0.225], "memory_precision": "float32",
    },
}  # fmt: skip
"""Of dense k-NN."""

_SGD = {
    "size": 448, "fit": "square", "head": "sgd", "learning_rate": 0.01, "standardise": False,
    "match": "none", "absent": "zero",
}  # fmt: skip
LINEAR: Table = {
    None: _BY_ID
    | {"head": "adamw", "steps": 1000, "learning_rate": 0.01, "standardise": False}
    | {"memory": 100_000, "epochs": 25, "step_images": 60},
    "leopart": _SGD | {"epochs": 25, "step_images": 60},
    "neco": _SGD | {"epochs": 20, "step_images": 128},
    "capi": {
        "size": 224, "fit": "square-bicubic", "head": "lbfgs", "standardise": True,
        "match": "none", "absent": "skip", "memory": ALL_CELLS,
    },
}  # fmt: skip
"""Of linear classifiers."""

MANY: Table = {None: _BY_ID | {"clusters": 500, "standardise": False, "memory": 100_000}}
"""Of clusters that are named after classes of a training set."""

UNUSED = {
    ("vote", "pixels"): {
        "temperature", "void_as", "crops", "memory", "memory_precision", "memory_folder",
    },
    ("head", "adamw"): {"epochs", "step_images"},
    ("head", "sgd"): {"steps", "memory", "standardise"},
    ("head", "lbfgs"): {"steps", "epochs", "step_images", "learning_rate", "memory"},
}  # fmt: skip
"""Settings of a probe that this vote or head has no use for."""


def clusters_itself(protocol: str | None) -> bool:
    """Whether the protocol says how clusters are found: a run's prototypes are no such clusters."""
    return protocol is not None and "kmeans" in CLUSTERS[protocol]


def settle(args: argparse.Namespace, table: Table) -> None:
    """Give each setting of `table` its value: that of args.protocol, else the user's, else the
    usual one. Prints what the protocol sets. Raises UserError for a setting that contradicts it,
    and for one that the user gives and nothing uses.
    """
    protocol = args.protocol
    fixed = table[protocol] if protocol is not None else {}
    for name, value in fixed.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise UserError(
                f"--protocol {protocol} sets {flag(name, value)}: {flag(name, given)} contradicts"
                " it"
            )
    chosen = {name for name in table[None] if getattr(args, name) is not None}
    for name in table[None].keys() - chosen:
        setattr(args, name, table[None][name])
    for name, value in fixed.items():
        setattr(args, name, value)
    require_used(args, chosen - fixed.keys())
    if fixed:
        listed = ", ".join(flag(name, value) for name, value in fixed.items())
        print(f"protocol {protocol} ({SOURCES[protocol]}): {listed}", flush=True)


def require_used(args: argparse.Namespace, chosen: Set[str]) -> None:
    """Raise UserError if one of the settings `chosen` is in `UNUSED` by the vote or head."""
    for (setting, choice), unused in UNUSED.items():
        if getattr(args, setting, None) == choice and (wrong := sorted(chosen & unused)):
            options = ", ".join(flag(name, getattr(args, name)) for name in wrong)
            raise UserError(f"{flag(setting, choice)} has no use for {options}")


def flag(name: str, value: Any) -> str:
    """A setting as an option: --void-as 0, --pca 50, --no flip."""
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return option
    if value is None or value is False:
        return f"no {option}"
    words = value if isinstance(value, list) else ["all" if value == ALL_CELLS else value]
    return " ".join([option, *map(str, words)])
