"""Files of results: report, comparison, benchmark and table show an altered one, or refuse it."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from tests.fuzz.damage import Random, damage
from tests.fuzz.json_damage import alter, put
from tests.tools.report.test_report import MACHINE, Page, log_line, write_measurements, write_run
from tools.benchmark.verdict import compare
from tools.report import comparison, one_run
from tools.report.results import read_run
from tools.report.schema import Rates
from train.run.json_file import read_json
from transfer.table import aligned, as_text, check_seeds, content_of, markdown, read_result

CONFIG = {
    "name": "run",
    "data": {"path": "my data.beton"},
    "model": {"arch": "resnet18", "num_prototypes": 32},
    "train": {"epochs": 20},
}
RESULT = {
    "name": "run", "task": "segmentation", "dataset": "cityscapes", "images": 2975,
    "scored": {"dataset": "cityscapes", "images": 500, "fingerprint": "3c"},
    "schedule": {"steps": 90_000, "batch_size": 16}, "step": 90_000,
    "init": {
        "weights": "runs/a", "kind": "file", "arch": "resnet50", "branch": "teacher", "frozen": 0,
        "metadata": {
            "run": "coco", "epochs": "800", "data": "coco.beton", "data_images": "118287",
            "step": "184800", "batch_size": "512", "config": '{"train": {"seed": 0}}',
        },
    },
    "results": [{"metric": "miou", "value": 0.7}, {"metric": "iou", "class": "a", "value": 0.9}],
    "config": {"name": "run", "optim": {"seed": 1, "lr": 0.1}, "data": {"root": "/data"}},
}  # fmt: skip
BENCHMARK = [
    {"stage": stage, "backend": "loader", "images_per_s": 99.5, "slowest": 80.0, "fastest": 120.0,
     "batch": 8, "threads": threads, "crops": "host", "operation": None}
    for stage, threads in (("decode", 1), ("decode", 2), ("step", 2))
]  # fmt: skip


class Target:
    """Two runs with all their files, and the code that damages one of these."""

    def __init__(self, folder: Path) -> None:
        self.run, self.other = write_run(folder / "run"), write_run(folder / "other")
        write_measurements(self.run)
        for picture in self.run.glob("*.png"):
            picture.unlink()
        benchmark = {**MACHINE, "settings": {"batch": 8}, "results": BENCHMARK}
        (self.run / "bench.json").write_text(json.dumps(benchmark))
        (self.run / "config.yaml").write_text(json.dumps(CONFIG))
        (self.run / "result.json").write_text(json.dumps(RESULT))
        (self.run / "metrics.jsonl").write_text("".join(log_line(step) for step in range(1, 9)))
        names = ("*.json", "config.yaml", "metrics.jsonl")
        files = sorted(path for name in names for path in self.run.glob(name))
        self.whole = {path: path.read_bytes() for path in files}
        self.page = one_run.build(read_run(self.run, {}))

    def try_one(self, random: Random) -> str:
        path = list(self.whole)[int(random.integers(len(self.whole)))]
        put(path, self._altered(path, random))
        try:
            return self._shown(path, random)
        except UserError as error:
            message = str(error)
            assert str(self.run) in message and message.isprintable(), repr(message)
            assert len(message) < 1000, message
            return "refused"
        finally:
            put(path, self.whole[path])

    def _altered(self, path: Path, random: Random) -> bytes:
        whole = self.whole[path]
        if path.suffix == ".jsonl":
            lines = whole.splitlines()
            number = int(random.integers(len(lines)))
            lines[number] = alter(json.loads(lines[number]), random)
            return b"\n".join(lines) + b"\n"
        if path.suffix == ".yaml" and random.integers(3):
            return damage(whole, random)
        return alter(json.loads(whole), random)

    def _shown(self, path: Path, random: Random) -> str:
        if path.name == "result.json":
            return self._table(path)
        if path.name == "bench.json" and random.integers(2):
            rates = read_json(path, Rates)
            text = compare(rates, rates, (path, path))
            assert all(line.isprintable() for line in text.split("\n")), repr(text)
            return "compared"
        run = read_run(self.run, {})
        assert len(run.damaged) <= 1 and all(line.isprintable() for line in run.damaged)
        if random.integers(8):
            page = one_run.build(run)
        else:
            page = comparison.build({"a": run, "b": read_run(self.other, {})})
        page.encode(errors="replace")
        if random.integers(8) == 0:
            Page(page)
        assert "<script" not in page
        for numbers in re.findall(r' (?:points|x1|x2|y1|y2|cx|cy|x|y|width)="([^"]*)"', page):
            assert "nan" not in numbers and "inf" not in numbers, numbers
        assert len(page) < 20 * len(self.page)
        return "named" if run.damaged else "shown"

    def _table(self, path: Path) -> str:
        results = [read_result(path)]
        check_seeds(results)
        content: dict[str, Any] = content_of(results)
        json.dumps(content)
        for text in (as_text(content, aligned), as_text(content, markdown)):
            text.encode()
            assert all(line.isprintable() for line in text.split("\n")), repr(text)
        assert "<" not in as_text(content, markdown)
        return "shown"
