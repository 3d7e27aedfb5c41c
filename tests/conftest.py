from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules exactness and oracle_tools
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a person has cached is used or touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 as the default dtype, for tests against closed forms."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
