"""A model that looks trained, for the tests of files of weights."""

import pytest
from torch import Tensor

from model import SlotCon
from tests.helpers.exported import trained_model


@pytest.fixture(scope="session")
def model() -> SlotCon:
    return trained_model()


@pytest.fixture(scope="session")
def encoder(model: SlotCon) -> dict[str, Tensor]:
    """The weights of the teacher's encoder."""
    return dict(model.teacher.encoder.state_dict())
