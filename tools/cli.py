"""What every command shares: how it fails."""

import sys
from collections.abc import Callable

from pipeline.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` ends the process with one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
