"""What all tests share."""

from pathlib import Path

import pytest
import torch

from tests.golden import GOLDEN

torch.set_num_threads(1)  # the models of the tests are tiny: a second thread waits more than it works


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test draws the same numbers alone and in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Folder of the golden numbers, see its README."""
    return GOLDEN
