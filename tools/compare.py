"""One self-contained HTML page of several runs: their curves in one chart each, what differs in
their configurations, their scores side by side.
"""

import argparse
import sys
from pathlib import Path

from tools.report.comparison import build, read_runs
from train.run.cli import CommandParser, check_writable, run
from train.run.provenance import write_bytes

EXAMPLES = """examples:
  python -m tools.compare runs/demo runs/demo_no_geometry --out compare.html
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.compare", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the page to write (.html)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    check_writable("--out", args.out)
    page = build(read_runs(args.runs)).encode()
    write_bytes(args.out, page)
    print(f"wrote {args.out} ({len(page) / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run(main)
