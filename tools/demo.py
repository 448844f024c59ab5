"""The whole way in a few minutes on a CPU: pack, pre-train, benchmark, evaluate, report.

Runs the same commands as a user, one after the other, and prints the path of the report at the end.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from pipeline.commands import arguments, as_called
from train.run.cli import CommandParser, run

RUN = Path("runs/demo")
BETON = RUN / "sample.beton"
SCENES = RUN / "scenes"
LEARNT = RUN / "learnt.txt"
"""The scenes that the probe learns from: the first 100 of those that the run has seen."""

STEPS = {
    "Pack the sample scenes": f"tools.build_dataset sample --out {BETON}",
    "Pre-train": f"train.pretrain --config configs/scenes_cpu.yaml --data.path {BETON} --name demo",
    "Measure each stage": f"tools.benchmark all --data {BETON} --config configs/scenes_cpu.yaml"
    f" --batch 32 --repeats 3 --seconds 0.1 --backends compiled --json {RUN}/bench.json",
    "Score the grouping on held-out scenes": f"evaluation.unsupervised_segmentation"
    f" --checkpoint {RUN} --images {SCENES}/val/images --labels {SCENES}/val/labels"
    f" --size 192 --json {RUN}/eval.json --picture {RUN}/eval.png",
    "Score its features, and untrained ones at the same stages": "evaluation.probe knn"
    f" --checkpoint {RUN} --images {SCENES}/val/images --labels {SCENES}/val/labels"
    f" --train-images {SCENES}/train/images --train-labels {SCENES}/train/labels"
    f" --train-list {LEARNT} --memory 5000 --seeds 0 --stage 2 4 --size 192"
    f" --json {RUN}/knn.json",
    "Count its slots": f"evaluation.slots --checkpoint {RUN} --data {BETON} --size 192"
    f" --max-images 300 --json {RUN}/slots.json --picture {RUN}/slots.png",
    "Draw the prototypes": f"evaluation.pictures prototypes --checkpoint {RUN} --data {BETON}"
    f" --size 192 --max-images 300 --out {RUN}/prototypes.png",
    "Draw the grouping of whole images": f"evaluation.pictures grouping --checkpoint {RUN}"
    f" --data {BETON} --size 192 --out {RUN}/grouping.png",
    "Draw the views that it trained on": f"evaluation.pictures views --checkpoint {RUN}"
    f" --data {BETON} --out {RUN}/views.png",
    "Write the report": f"tools.report {RUN}",
}


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
    LEARNT.write_text("".join(f"{number}\n" for number in range(100)))
    began = time.perf_counter()
    for number, (title, command) in enumerate(STEPS.items(), start=1):
        shown = as_called(f"python -m {command}")
        print(f"\n[{number}/{len(STEPS)}] {title}\n$ {shown}", flush=True)
        if code := subprocess.call(arguments(command)):
            sys.exit(code)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Open {(RUN / 'report.html').resolve()}")


if __name__ == "__main__":
    run(main)
