"""Prototypes merged to fewer groups without labels: those that two views of an image confuse.

A point of an image that both of its views show has a prototype in each. Where these differ, the
network takes the one for the other: they are parts of one thing, as the bricks and the mortar of a
wall are. So are two that are confused with the same others. Pairs of groups are joined, the most
confused first.

Letters: B images of a batch, K prototypes, G groups, H W cells of a view, h w of an image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from evaluation.datasets.images import ImageSource, spread
from evaluation.segment import Segmenter
from evaluation.views import make_views
from model.alignment import align_to_overlap, has_area
from pipeline.errors import UserError
from pipeline.loader import choose
from train.config import RunConfig

IMAGES, BATCH = 1000, 16
"""At most so many unlabelled images are looked at, so many at once."""
NEIGHBOURHOOD = 3
"""A cell belongs to a group by the share of it among so many cells along each side."""
TEMPERATURE = 0.02
"""Of the softmax: a winner that is 0.05 ahead of the next has 92 % of a point. Counts of winners
alone are noisy: in one of four trainings they left a background of the demo in pieces."""
UNSEEN = 1e-9
"""Confusions of a pair that was never confused: of such pairs the rarest are joined first."""

Views = tuple[Tensor, Tensor, Tensor]
"""Views [2, B, 3, S, S], overlap [2, B, 4] and flipped [2, B], as the model sees them."""


@dataclass(frozen=True)
class Groups:
    """K prototypes in G groups."""

    of: np.ndarray
    """int64 [K], the group of each prototype; -1 for one that no point of the views has."""
    points: int
    """Points of the views that were compared."""
    made: str
    """How, in words."""

    @property
    def count(self) -> int:
        return int(self.of.max()) + 1

    def shares(self, scores: Tensor) -> Tensor:
        """Scores [B, K, h, w] → float32 [B, G, h, w]: the share of each group among the cells
        around a cell. A cell has the group of the prototype that wins it.
        """
        of = torch.from_numpy(self.of).to(scores.device)
        used = torch.where((of >= 0)[:, None, None], scores, -torch.inf)
        groups = F.one_hot(of[used.argmax(dim=1)], self.count).permute(0, 3, 1, 2).float()
        return F.avg_pool2d(groups, NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False)


def training_views(images: ImageSource, config: RunConfig, device: torch.device) -> Iterator[Views]:
    """Views of the images, or of `IMAGES` of them, as in the epoch after the run's last one."""
    backend, _ = choose("auto", "auto", device)
    epoch = config.train.epochs
    views_of = config.views_of(epoch - 1)
    which = spread(len(images), IMAGES)
    bar = tqdm(total=len(which), desc="two views of unlabelled images", unit="image")
    with bar:
        for begin in range(0, len(which), BATCH):
            batch = which[begin : begin + BATCH]
            _, views, params = make_views(
                images, batch, config.train.seed, epoch, views_of, backend, device
            )
            overlap, flipped = (
                torch.from_numpy(each).to(device) for each in (params.overlap, params.flipped)
            )
            yield views, overlap, flipped
            bar.update(len(batch))


@torch.no_grad()
def count_confusions(segment: Callable[[Tensor], Tensor], batches: Iterator[Views]) -> np.ndarray:
    """float64 [K, K]: points of the shared pixels by their prototypes in both views.

    `segment` turns views [B, 3, S, S] into scores [B, K, H, W]; the points are the cells of the
    aligned maps. A point counts in parts for several prototypes, by a softmax of its scores; a
    prototype that wins no point has none. Raises ValueError if no two views share a pixel.
    """
    counts, wins = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for views, overlap, flipped in batches:
        shared = has_area(overlap[0])
        first, second = (
            align_to_overlap(segment(view).float(), *where)[shared].movedim(1, 3).flatten(0, 2)
            for view, *where in zip(views, overlap, flipped, strict=True)
        )
        parts = [(scores / TEMPERATURE).softmax(dim=1).double() for scores in (first, second)]
        counts = parts[0].T @ parts[1] + counts
        winners = torch.cat([first, second]).argmax(dim=1)
        wins = torch.bincount(winners, minlength=first.shape[1]) + wins
    if not wins.any():
        raise ValueError("no two views share a pixel")
    used = wins > 0
    return (counts * used * used[:, None]).cpu().numpy()


def merge(confusions: np.ndarray, count: int) -> np.ndarray:
    """int64 [K]: the group of each prototype, given `confusions` [K, K]; -1 for a prototype without
    points. Groups are numbered in the order of their first prototypes.

    Prototypes i and j are confused as often as a point goes from i to any prototype, and from there
    to j, where n[i, k] points have i in one view and k in the other, and n[k] have k:

        twice[i, j] = Σ_k n[i, k]·n[k, j] / n[k]

    Counted once, a background that differs from image to image is left in pieces: those of its
    prototypes that are far apart are never confused. Groups are joined until `count` are left: each
    time the two with the highest lift, their share of `twice` divided by what chance would give. It
    is the mean of the lifts of their prototypes, weighted by the points that these expect (average
    linkage). Raises ValueError if fewer prototypes have points.
    """
    joint = (confusions + confusions.T).astype(np.float64)
    used = np.flatnonzero(joint.sum(axis=1))
    if len(used) < count:
        raise ValueError(f"{len(used)} of {len(joint)} prototypes are in use")
    once = joint[np.ix_(used, used)]
    joint = once @ (once / once.sum(axis=1, keepdims=True)) + UNSEEN
    groups = [[k] for k in used.tolist()]
    while len(groups) > count:
        mass = joint.sum(axis=1)
        lift = np.triu(joint / np.outer(mass, mass), 1)
        i, j = np.unravel_index(lift.argmax(), lift.shape)
        joint[i] += joint[j]
        joint[:, i] += joint[:, j]
        joint = np.delete(np.delete(joint, j, axis=0), j, axis=1)
        groups[i] += groups.pop(int(j))
    of = np.full(len(confusions), -1, np.int64)
    for number, members in enumerate(groups):
        of[members] = number
    return of


def merge_prototypes(
    network: Segmenter, config: RunConfig, images: ImageSource, count: int, device: torch.device
) -> Groups:
    """The prototypes of a network in `count` groups, by two views of unlabelled images. Raises
    UserError.
    """
    batches = training_views(images, config, device)
    try:
        confusions = count_confusions(lambda view: network.segment(view)[0], batches)
        of = merge(confusions, count)
    except UserError:  # it says already what it is about
        raise
    except ValueError as error:
        raise UserError(f"--merge {count}: on the unlabelled images {error}") from None
    seen, points = min(len(images), IMAGES), round(confusions.sum())
    made = (
        f"{len(of)} prototypes merged to {count} groups, without labels, by how often two views of"
        f" {seen:,} images confuse them"
    )
    return Groups(of, points, made)
