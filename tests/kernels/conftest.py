"""What the tests of several kernels share."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """Fill what `torch.empty` returns with nan, so that a place no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
