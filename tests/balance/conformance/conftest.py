"""One thread, and one pair of processes for all parallel settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.balance.conformance.processes import two_processes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, rank by rank: gradients and biases in every parallel setting."""
    return two_processes(tmp_path_factory.mktemp("ranks"))
