"""Write one HTML page that compares runs: a chart of each value with a curve for each run, their
scores side by side, and the settings in which they differ.
"""

import sys
from pathlib import Path

from train.run.cli import CommandParser, check_writable, run

EXAMPLES = """examples:
  python -m tools.compare runs/demo runs/demo_no_geometry --out compare.html
"""


def main() -> None:
    parser = CommandParser(prog="python -m tools.compare", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the page to write (.html)")
    args = parser.parse_args()
    check_writable("--out", args.out)
    from tools.report.comparison import build, read_runs  # slow: --help does not wait for it
    from tools.report.page import write_page

    runs = read_runs(args.runs)
    write_page(args.out, build(runs))
    for one in runs.values():
        for line in one.damaged:
            print(f"warning: not shown: {line}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
