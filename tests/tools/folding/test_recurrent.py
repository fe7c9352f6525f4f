"""Networks with a BatchNormLSTM: what is beside it folds; its own statistics are those of steps."""

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, BatchNormLSTM, fold

REASON = "each step of its recurrent network has statistics of its own"


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 3, padding=1), BatchNorm(8)
        self.lstm = BatchNormLSTM(8, 5, max_length=4, batch_first=True, **options)
        self.head = nn.Linear(5 * (1 + self.lstm.bidirectional), 2)

    def forward(self, x):
        return self.head(self.lstm(self.norm(self.conv(x)).transpose(1, 2))[0])


def trained(model, x):
    for _ in range(3):
        model(x)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_what_is_beside_it_is_folded_and_the_rest_stays_as_it_is(options):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6)
    model = trained(Network(**options), x)
    folded = fold(model, x)
    report = folded.fold_report
    assert [layer.layer for layer in report.folded] == ["norm"]
    assert {layer.reason for layer in report.left} == {REASON}
    assert len(report.left) == len(list(model.lstm._every_norm()))
    assert report.notes == ()
    torch.testing.assert_close(folded(x), model(x))
    longer = torch.randn(5, 3, 9)
    torch.testing.assert_close(folded(longer), model(longer))
    banks = folded.lstm.norms[0]["cell"].banks
    kept = model.lstm.norms[0]["cell"].banks
    assert torch.equal(banks["step2"].running_var, kept["step2"].running_var)


def test_alone_it_is_left_with_the_reason():
    torch.manual_seed(0)
    x = torch.randn(6, 16, 3)
    lstm = trained(BatchNormLSTM(3, 5, max_length=4), x)
    folded = fold(lstm, x)
    assert {layer.reason for layer in folded.fold_report.left} == {REASON}
    assert torch.equal(folded(x)[0], lstm(x)[0])
