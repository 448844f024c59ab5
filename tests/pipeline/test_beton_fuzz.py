"""No damage to a beton causes a crash, a hang or an unnoticed wrong image."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests import ROOT
from tests.beton_fuzz import write_target

SEEDS, PROCESSES = 2560, 2


def test_damaged_betons_are_refused_read_correctly_or_found(tmp_path: Path) -> None:
    """A bad pointer that is followed ends the process with a signal. So other processes try the
    damage, and the last seed in their log is the failed one.
    """
    count = SEEDS // PROCESSES
    running = []
    for number in range(PROCESSES):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_target(folder)
        command = [
            sys.executable,
            "-m",
            "tests.beton_fuzz",
            folder,
            str(number * count),
            str(count),
        ]
        log = (folder / "log").open("w")
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        log.close()
    outcomes: Counter[str] = Counter()
    try:
        for number, process in enumerate(running):
            code = process.wait(timeout=150)
            text = (tmp_path / str(number) / "log").read_text()
            seeds = re.findall(r"^seed .*", text, re.MULTILINE)
            assert code == 0, f"exit code {code} at {seeds[-1:]}:\n{text[-2000:]}"
            assert len(seeds) == count
            outcomes.update({name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", text)})
    finally:
        for process in running:
            process.kill()
            process.wait()
        shutil.rmtree(tmp_path)
    assert outcomes.total() == SEEDS
    assert min(outcomes["refused"], outcomes["read"], outcomes["found"]) > SEEDS // 50
