"""Does it learn, and for how many operations? docs/results.md comes from

python -m tests.evidence camvid WORK --root CamVid --jobs 2      # the method and parts of it
python -m tests.evidence curves camvid WORK --root CamVid        # quality against operations
"""

import sys

from tests.evidence import curves, variants
from train.run.cli import run

if __name__ == "__main__":
    if sys.argv[1:2] == ["curves"]:
        del sys.argv[1]
        run(curves.main)
    else:
        run(variants.main)
