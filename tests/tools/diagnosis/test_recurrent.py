"""A recurrent network: its layers have a bank for each step."""

import torch

from batchnorm import BatchNormLSTM, diagnose

LENGTHS = torch.arange(40) % 8 + 1


def test_its_last_step_alone_is_not_taken_for_a_layer():
    """Few sequences get there: of them it would say that batches are small."""
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 5, max_length=8, batch_first=True)
    batches = [
        {"input": torch.randn(40, 8, 3), "mask": torch.arange(8) < LENGTHS[:, None]}
        for _ in range(4)
    ]
    for batch in batches * 10:
        lstm(**batch)
    found = diagnose(lstm, batches)
    assert found.findings == ()
    assert found.gap.value > 0
    assert "in a recurrent network, each step" in found.notes[0]
