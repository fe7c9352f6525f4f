"""What a call takes is counted to the byte."""

import torch

from batchnorm.bench.allocations import allocations


def test_held_and_peak():
    kept = []

    def call():
        a = torch.empty(1 << 16, dtype=torch.float32)
        kept.append(a.clone())  # both are there
        del a
        return torch.empty(1 << 10, dtype=torch.uint8)

    before = torch.empty(1 << 20)
    found = allocations(call)
    assert found.held == (4 << 16) + (1 << 10)
    assert found.peak == 2 * (4 << 16)
    assert allocations(kept.clear).held == -(4 << 16)
    assert before.numel() == 1 << 20
