"""One self-contained HTML page of a run: how it learnt, what it learnt, how fast, at what cost.

The page opens offline and asks nothing of any server. What was measured of the run is found in its
folder under its usual name, or given by an option; the page ends with the commands that would add
the rest.
"""

import argparse
import sys
from pathlib import Path

from tools.report.one_run import build
from tools.report.results import (
    PICTURES,
    RESULTS,
    Part,
    read_run,
)
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import write_bytes

EXAMPLES = """examples:
  python -m tools.report runs/demo
  python -m tools.report runs/coco --benchmark bench.json --evaluation eval.json \\
      --prototypes prototypes.png --out coco.html
  python -m tools.compare runs/demo runs/coco --out compare.html
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.report", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    for kind, parts in (("JSON", RESULTS), ("picture", PICTURES)):
        for part in parts:
            text = option_help(kind, part)
            parser.add_argument(f"--{part.name}", type=Path, metavar="FILE", help=text)
    parser.add_argument("--out", type=Path, help="the page to write (RUN_DIR/report.html)")
    return parser.parse_args(argv)


def option_help(kind: str, part: Part) -> str:
    """JSON of evaluation.slots: Use of the prototypes (RUN_DIR/slots.json if there)"""
    return f"{kind} of {part.made_by}: {part.title} (RUN_DIR/{part.file} if there)"


def main() -> None:
    args = parse(sys.argv[1:])
    out = args.out or args.run / "report.html"
    check_writable("--out", out)
    given = {part.name: getattr(args, part.name) for part in (*RESULTS, *PICTURES)}
    page = build(read_run(args.run, given)).encode()
    write_bytes(out, page)
    print(f"wrote {out} ({len(page) / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run(main)
