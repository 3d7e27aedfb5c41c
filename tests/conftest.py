from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules exactness and oracle_tools
torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype, for tests against closed forms."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
