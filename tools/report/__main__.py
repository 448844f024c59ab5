"""Write one HTML page about a run: how it learnt, what it learnt, how fast, and at what cost.

The page is a single file that opens offline. It shows each measurement whose file lies in the run's
folder under its usual name, or is given by an option. A damaged file in the folder is named instead
of shown. The page ends with the commands that make the measurements which are still missing.
"""

import sys
from pathlib import Path

from tools.report.parts import PICTURES, RESULTS
from train.run.cli import CommandParser, check_writable, run

EXAMPLES = """examples:
  python -m tools.report runs/demo
  python -m tools.report runs/coco --benchmark bench.json --evaluation eval.json \\
      --prototypes prototypes.png --out coco.html
  python -m tools.compare runs/demo runs/coco --out compare.html
"""


def main() -> None:
    parser = CommandParser(prog="python -m tools.report", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run")
    for kind, parts in (("JSON", RESULTS), ("picture", PICTURES)):
        for part in parts:
            text = f"{kind} of {part.made_by}: {part.title} (default: RUN_DIR/{part.file})"
            parser.add_argument(f"--{part.name}", type=Path, metavar="FILE", help=text)
    parser.add_argument("--out", type=Path, help="the page to write (default: RUN_DIR/report.html)")
    args = parser.parse_args()
    out = args.out or args.run / "report.html"
    check_writable("--out", out)
    given = {part.name: getattr(args, part.name) for part in (*RESULTS, *PICTURES)}
    from tools.report.one_run import build  # takes seconds, which --help does not wait for
    from tools.report.page import write_page
    from tools.report.results import read_run

    content = read_run(args.run, given)
    write_page(out, build(content))
    for line in content.damaged:
        print(f"warning: not shown: {line}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
