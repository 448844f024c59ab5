"""The whole way in a few minutes on a CPU: pack, pre-train, evaluate, benchmark, report.

Runs the same commands as a user, one after the other, and prints the path of the report at the end.
Without a GPU it trains in two processes, each on one thread: they share two cores better than the
threads of one process do, and the result does not depend on the number of cores.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

from pipeline.commands import arguments, as_called
from train.run.cli import CommandParser, run

CONFIG = Path("configs/fast/scenes_cpu.yaml")
RUN = Path("runs/demo")
BETON = RUN / "sample.beton"
SCENES = RUN / "scenes"
LEARNT = RUN / "learnt.txt"
"""The labelled scenes that the probes learn from: the first `LABELLED` of those that the run has
seen."""
LABELLED = 200

IN_TWO = "torch.distributed.run --standalone --nproc_per_node 2 -m "
"""What torchrun is short for; without it a command runs in one process."""
_SCORED = f"--checkpoint {RUN} --images {SCENES}/val/images --labels {SCENES}/val/labels --size 192"
_LEARNT = (
    f"--train-images {SCENES}/train/images --train-labels {SCENES}/train/labels"
    f" --train-list {LEARNT} --memory 20000 --seeds 0"
)
STEPS = {
    "Pack the sample scenes": f"tools.build_dataset sample --out {BETON}",
    "Pre-train": f"{IN_TWO}train.pretrain --config {CONFIG} --data.path {BETON} --name {RUN.name}",
    "Group held-out scenes without labels, beside the untrained network":
    f"evaluation.unsupervised_segmentation {_SCORED} --merge --unlabelled {BETON}"
    " --features untrained --baseline none"
    f" --json {RUN}/eval.json --picture {RUN}/eval.png",
    "Score its features with labels, beside the untrained network's":
    f"evaluation.probe knn {_SCORED} {_LEARNT} --json {RUN}/knn.json",
    "The same by a linear probe":
    f"evaluation.probe linear {_SCORED} {_LEARNT} --json {RUN}/linear.json",
    "Count its slots": f"evaluation.slots --checkpoint {RUN} --data {BETON} --size 192"
    f" --max-images 200 --json {RUN}/slots.json --picture {RUN}/slots.png",
    "Draw the views that it trained on": f"evaluation.pictures views --checkpoint {RUN}"
    f" --data {BETON} --out {RUN}/views.png",
    "Measure the main stages": f"tools.benchmark read decode step pipeline --data {BETON}"
    f" --config {CONFIG} --batch 16 --images 128 --repeats 2 --seconds 0.1 --backends compiled"
    f" --json {RUN}/bench.json",
    "Write the report": f"tools.report {RUN}",
}  # fmt: skip


def main() -> None:
    """Run all steps; the files go to runs/demo/. Replaces an earlier demo."""
    parser = CommandParser(
        prog="python -m tools.demo",
        description=__doc__,
        epilog="example:\n  python -m tools.demo",
    )
    parser.parse_args()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    LEARNT.write_text("".join(f"{number}\n" for number in range(LABELLED)))
    began = time.perf_counter()
    on_gpu = _import_once()
    for number, (title, command) in enumerate(STEPS.items(), start=1):
        called = command.removeprefix(IN_TWO) if on_gpu else command
        print(
            f"\n[{number}/{len(STEPS)}] {title}\n$ {as_called(f'python -m {called}')}", flush=True
        )
        if code := call(called):
            sys.exit(code)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Open {(RUN / 'report.html').resolve()}")


def call(command: str) -> int:
    """Run the command as `python -m` does, in a fork of this process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=_execute, args=(command,))
    process.start()
    process.join()
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code  # ended by a signal, as a shell says it


def _execute(command: str) -> None:
    sys.orig_argv = arguments(command)  # what the results name as their command
    _, _, module, *options = sys.orig_argv
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _import_once() -> bool:
    """Import what takes each command seconds; the forks have it. Returns whether there is a GPU,
    which is asked of the driver: CUDA must not be in use before a fork.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from train import trainer  # noqa: F401

    return torch.cuda.is_available()


if __name__ == "__main__":
    run(main)
