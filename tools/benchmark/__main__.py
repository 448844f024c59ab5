"""Throughput of each stage from a beton to a training step, measured alone on the same images, and
which stage limits training.
"""

import sys

from pipeline.errors import UserError
from tools.benchmark.options import check, parse
from train.run.cli import run


def main() -> None:
    args = parse(sys.argv[1:], str(__doc__))
    if args.compare and (args.stages or args.data or args.synthetic):
        raise UserError("--compare measures nothing: give no stages, --data or --synthetic")
    if not args.compare:
        check(args)
    from tools.benchmark.measure import compare_files, measure  # slow: --help does not wait for it

    if args.compare:
        print(compare_files(args.compare))
    else:
        measure(args)


if __name__ == "__main__":
    run(main)
