"""Tries altered inputs on one reader: `python -m tests.fuzz READER --seconds 600`."""

import argparse
import sys

from tests.fuzz.driver import READERS, fuzz

EPILOG = """
examples:
  python -m tests.fuzz beton --seconds 600              ten minutes, one process
  python -m tests.fuzz jpeg --inputs 5000               a fixed number of inputs
  python -m tests.fuzz pickle --first 1234 --inputs 1   one failed input again
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--inputs", type=int, help="stop after this number of inputs")
    parser.add_argument("--first", type=int, default=0, help="seed of the first input (0)")
    args = parser.parse_args()
    if args.seconds is None and args.inputs is None:
        parser.error("give --seconds or --inputs")
    result = fuzz(args.reader, args.first, args.inputs, args.seconds, report=print)
    print(result)
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
