"""The tests, a folder for each room of the code; `helpers` makes what they need."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
