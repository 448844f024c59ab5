"""Options that the commands share, and their checks: what --help needs, without torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from evaluation.datasets.images import FIT_HELP, FITS
from evaluation.datasets.open import add_dataset_options
from evaluation.pictures.drawing import check_picture
from evaluation.protocols import ABSENT, MATCHES, Table
from pipeline.choices import WHITEN
from pipeline.errors import UserError
from train.run.cli import CommandParser, check_writable

AS_CLASSES = "classes"
"""`--merge` without a number"""
SHOWN = 5
"""Prototypes in each column of the picture of evaluation.slots."""
FEATURES_HELP = (
    "teacher, student: encoders of the run; projector: the teacher's encoder and projector; "
    "untrained: the run's encoder before training; supervised: torchvision's weights for the same "
    "ResNet (supervised:resnet18: for another); timm:NAME: any timm model (needs the extra "
    "[timm]); pixels: mean colours of blocks of 8×8 pixels"
)


def stages_of(text: str) -> tuple[int, ...]:
    """The numbers in 2 or 2+3+4 of `--stage`. Raises ValueError for anything else."""
    numbers = tuple(int(number) for number in text.split("+"))
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(text)
    return numbers


def stage(text: str) -> str:
    """2 or 2+3+4: the type of `--stage`."""
    return "+".join(map(str, stages_of(text)))


def add_feature_options(
    parser: CommandParser, features: list[str], *, compare: bool = True
) -> None:
    """The options that `specs.open_all` reads. `features` is the default. Without `compare` they
    name one network, read at one place, and none beside it.
    """
    parser.add_argument(
        "--features",
        nargs="+" if compare else 1,
        default=features,
        metavar="SPEC",
        help=f"features to take (default: {' '.join(features) or 'none'}). {FEATURES_HELP}",
    )
    parser.add_argument("--weights", type=Path, help="file of weights for supervised or timm:NAME")
    parser.add_argument(
        "--stage",
        type=stage,
        nargs="+" if compare else 1,
        metavar="N[+N…]",
        help="stages of the networks to read, each alone, or joined by +: each is scaled to length "
        "1 by cell and brought to the finest grid. Stages are a ResNet's layers (1 to 4), a ViT's "
        "blocks, the levels of timm's other networks (the last one)",
    )
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=[8, 16],
        help="dilate the networks' last stages, so that cells are so many pixels wide",
    )
    if not compare:
        parser.set_defaults(baseline="none")
        return
    parser.add_argument(
        "--baseline",
        choices=["untrained", "none"],
        default="untrained",
        help="untrained: beside each network, the same one before training, read at the same "
        "stages: weights drawn with the run's seed, else with seed 0 (untrained)",
    )


def add_scoring_options(parser: CommandParser, features: list[str], table: Table) -> None:
    """The options of commands that score features on labelled images. `features` is the default;
    `table` has the protocols and the usual values of settings, see `protocols.settle`.
    """
    if protocols := [name for name in table if name]:
        parser.add_argument(
            "--protocol",
            choices=protocols,
            help="settings of a published evaluator; prints what it sets",
        )
    else:
        parser.set_defaults(protocol=None)
    parser.add_argument("--checkpoint", type=Path, help="run folder, or one of its checkpoints")
    add_dataset_options(parser)
    add_feature_options(parser, features)
    parser.add_argument(
        "--whiten",
        type=float,
        nargs="?",
        const=WHITEN,
        metavar="P",
        help="centre the features and multiply them by covariance^-P of unlabelled cells (those of "
        f"the training set, where there is one): {WHITEN} without P; 0.5 whitens in full",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help=f"random seeds, one result each ({' '.join(map(str, table[None]['seeds']))})",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the evaluated square in pixels (320 for 224-pixel views, others in "
        "proportion)",
    )
    parser.add_argument("--fit", choices=FITS, help=f"how images become squares. {FIT_HELP}")
    parser.add_argument(
        "--match",
        choices=MATCHES,
        help="class of a cluster: one to one by most pixels or by the sum of IoU, by the majority "
        f"of its pixels or by its best IoU, or its own number ({table[None]['match']})",
    )
    parser.add_argument(
        "--absent",
        choices=ABSENT,
        help="classes that are neither labelled nor predicted: left out of mIoU, or 0 (skip)",
    )
    parser.add_argument(
        "--standardise",
        action="store_true",
        default=None,
        help="subtract the mean of each feature, divide by its deviation",
    )
    parser.add_argument("--batch", type=int, default=8, help="images at once (8)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--picture", type=Path, help="draw samples and IoU by class to this file (.png)"
    )


def check_scoring_options(
    args: argparse.Namespace, positive: Sequence[str], *, prototypes: bool = False
) -> None:
    """Refuse bad options before any work; `positive` as in `require_positive`, `prototypes` as in
    `check_feature_options`. Raises UserError.
    """
    require_positive(args, ("batch", "size", *positive))
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be different and at least 0")
    check_feature_options(args, prototypes=prototypes)
    if args.whiten is not None and not 0 < args.whiten <= 1:
        raise UserError(f"--whiten must be above 0 and at most 1, not {args.whiten}")
    check_outputs(args)


def check_feature_options(args: argparse.Namespace, *, prototypes: bool = False) -> None:
    """Refuse options of `add_feature_options` that contradict each other. `prototypes`: those of
    --checkpoint are scored, too. Raises UserError.
    """
    if len(set(args.features)) < len(args.features):
        raise UserError("--features names the same features twice")
    if args.stage and "projector" in args.features:
        raise UserError("--stage is of encoders: the projector follows the last stage")
    network = bool({*args.features} - {"pixels"})
    if args.stage and not network:
        raise UserError(f"--stage {' '.join(args.stage)}: pixels have no stages")
    if args.output_stride and not network and not prototypes:
        raise UserError(f"--output-stride {args.output_stride}: no network to dilate")


def require_positive(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise UserError if one of these options is given and not above 0."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise UserError if --json or --picture cannot be written."""
    if args.json:
        check_writable("--json", args.json)
    if args.picture:
        check_picture("--picture", args.picture)
