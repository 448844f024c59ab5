"""Bytes that a training step sends between processes: counted on two, or computed from the model.

    python -m tests.communication [--config configs/coco_r50_800ep.yaml] [--batch 4]

It counts the tensors that each process passes to a collective, by purpose: gradients, keys of the
slot loss, counts, centre. The library decides how many bytes cross the wire: a ring sends
2·(W − 1)/W times a summed tensor from each of W processes. CPUs have no SyncBatchNorm, so its part
is computed. For each layer with C channels and each view it gathers 2C + 1 values from each process
in the forward, and sums 2C in the backward.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import ModelConfig, SlotCon
from tests.helpers.processes import run_workers
from train.config import load_config

SIDE = 64  # of the views; it changes the bytes only through the number of active slots


def count(model_config: ModelConfig, batch: int) -> Counter[str]:
    """Bytes that a process passes to each kind of collective in one step."""
    with TemporaryDirectory() as folder:
        run_workers(_worker, Path(folder), model_config, batch, limit_s=600)
        sent: Counter[str] = torch.load(Path(folder) / "0.pt", weights_only=False)
    return sent


def _worker(rank: int, folder: Path, config: ModelConfig, batch: int) -> None:
    torch.manual_seed(0)
    model = SlotCon(config)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    sent: Counter[str] = Counter()

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent["gradients"] += bucket.buffer().nbytes
        future: Any = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    ddp.register_comm_hook(None, hook)
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

    def gathered(output: Tensor, source: Tensor, *rest: Any, **options: Any) -> Any:
        kind = "keys" if source.is_floating_point() else "counts and masks"
        sent[f"gathered: {kind}"] += source.nbytes
        return gather(output, source, *rest, **options)

    def reduced(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        if not options.get("async_op"):
            sent["summed: centre and counts"] += tensor.nbytes
        return reduce(tensor, *rest, **options)

    dist.all_gather_into_tensor, dist.all_reduce = gathered, reduced
    torch.manual_seed(rank)
    overlap = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, batch, 4)
    output = ddp(torch.randn(2, batch, 3, SIDE, SIDE), overlap, torch.zeros(2, batch).bool())
    output.loss.backward()
    torch.save(sent, folder / f"{rank}.pt")


def statistics(model: SlotCon) -> tuple[int, int]:
    """Bytes that SyncBatchNorm gathers and sums in a step, two views each: float32."""

    def channels(module: nn.Module) -> tuple[int, int]:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d)
        widths = [layer.num_features for layer in module.modules() if isinstance(layer, norms)]
        return sum(2 * width + 1 for width in widths), sum(2 * width for width in widths)

    student, predictor = channels(model.student), channels(model.predictor)
    gathered = 2 * (2 * student[0] + predictor[0])  # the teacher gathers as much
    return 4 * gathered, 4 * 2 * (student[1] + predictor[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.communication", description=__doc__)
    parser.add_argument("--config", default="configs/coco_r50_800ep.yaml")
    parser.add_argument("--batch", type=int, default=4, help="images of each process")
    args = parser.parse_args()
    config, _ = load_config(["--config", args.config])
    sent = count(config.model, args.batch)
    gathered, summed = statistics(SlotCon(config.model))
    rows = [
        *((purpose, size, "counted") for purpose, size in sorted(sent.items())),
        ("gathered: batch statistics", gathered, "computed"),
        ("summed: batch statistics", summed, "computed"),
    ]
    print(f"{args.config}, {args.batch} images a process, views of {SIDE} pixels", file=sys.stderr)
    for purpose, size, how in rows:
        print(f"{purpose:30} {size:13,} bytes  {how}")


if __name__ == "__main__":
    main()
