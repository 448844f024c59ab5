"""A fixed number of altered inputs for each reader; `python -m tests.fuzz` tries more."""

import pytest

from tests.fuzz.driver import READERS, fuzz

INPUTS = {"beton": 400, "configuration": 30, "results": 30}
"""Inputs of a reader, by its speed; `OTHERS` for those that are not named."""
OTHERS = 75


@pytest.mark.parametrize("reader", READERS)
def test_altered_inputs(reader: str) -> None:
    """Without it a damaged or hostile file crashes a command, hangs it, or is believed."""
    result = fuzz(reader, 0, INPUTS.get(reader, OTHERS), seconds=None)
    assert not result.failures, str(result)
    assert result.inputs == INPUTS.get(reader, OTHERS)
    assert len(result.outcomes) > 1, f"the damage does not reach the reader: {result}"
