"""A mask in a batch is used, or the tools say why not: silently left out, padding would count."""

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, BatchNormLSTM, recalibrate
from batchnorm.tools.feeding import call

METHODS = pytest.mark.parametrize("method", ["batch", "layerwise"])
LENGTHS = torch.tensor([5, 5, 3, 4, 2, 1, 5])
MASK = torch.arange(5) < LENGTHS[:, None]


def sequences():
    """Padding is NaN."""
    x = 2 * torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).double() + 1
    return torch.where(MASK[..., None], x, torch.nan)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step_by_step(lstm, x, lengths, ddof):
    """What comes into each part at each step, if the variance with ddof normalises, in float64."""
    w_ih, w_hh = (w.detach().numpy() for w in (lstm.weight_ih_l0, lstm.weight_hh_l0))
    seen = {part: [] for part in lstm.normalize}

    def normalize(part, values):
        norm = lstm.norms[0][part]
        seen[part].append(values)
        y = (values - values.mean(0)) / np.sqrt(values.var(0, ddof=ddof) + norm.eps)
        shift = 0 if norm.bias is None else norm.bias.detach().numpy()
        return y * norm.weight.detach().numpy() + shift

    h = c = np.zeros((len(x), w_hh.shape[1]))
    for step in range(lengths.max()):
        on = lengths > step
        x, h, c, lengths = x[on], h[on], c[on], lengths[on]
        gates = normalize("input", x[:, step] @ w_ih.T)
        i, f, g, o = np.split(gates + normalize("hidden", h @ w_hh.T), 4, 1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(normalize("cell", c))
    return seen


@pytest.mark.parametrize(("method", "ddof"), [("batch", 0), ("layerwise", 1)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("by", ["name", "step"])
def test_statistics_of_a_masked_recurrent_network(method, ddof, batch_first, by):
    """Each step's are of the sequences that go on, whatever the method and however it is said.

    All batches together are the data: layerwise, in two; by the batch's own statistics, in one.
    """
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 4, max_length=5, batch_first=batch_first).double()
    x, axis = sequences(), 0 if batch_first else 1
    given_x, mask = (x, MASK) if batch_first else (x.transpose(0, 1), MASK.T)
    size = 4 if method == "layerwise" else 7
    parts = list(zip(given_x.split(size, axis), mask.split(size, axis), strict=True))
    if by == "name":
        batches = [{"input": part, "mask": of_it} for part, of_it in parts]
        report = recalibrate(lstm, batches, method=method)
    else:
        report = recalibrate(
            lstm, parts, method=method, step=lambda model, batch: model(batch[0], mask=batch[1])
        )
    assert (
        repr(report)
        == f"Recalibration({method!r}: 15 layers from {len(parts)} batch{'es' * (len(parts) > 1)})"
    )
    seen = step_by_step(lstm, x.numpy(), LENGTHS.numpy(), ddof)
    for part, values in seen.items():
        norm = lstm.norms[0][part]
        for step, of_step in enumerate(values):
            keeper = norm.banks[f"step{step}"] if step < 4 else norm
            mean, var = keeper.running_mean.numpy(), keeper.running_var.numpy()
            # float64 through five steps, each of which may divide by a small σ.
            np.testing.assert_allclose(mean, of_step.mean(0), rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(var, of_step.var(0, ddof=1), rtol=1e-9, atol=1e-11)
    going = MASK.sum(0).tolist()
    assert sorted(layer.values for layer in report.layers) == sorted(3 * going)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = BatchNorm(3).double(), BatchNorm(3).double()

    def forward(self, x, mask=None):
        y = torch.where(mask[:, None], x, 0) if mask is not None else x
        return self.second(self.first(y, mask).square(), mask)


@METHODS
@pytest.mark.parametrize("by", ["name", "step"])
def test_statistics_of_a_masked_network(method, by):
    x, model = sequences().transpose(1, 2), Padded()
    if by == "name":
        report = recalibrate(model, [{"x": x, "mask": MASK}], method=method)
    else:
        report = recalibrate(
            model, [(x, MASK)], method=method, step=lambda model, batch: model(*batch)
        )
    assert report.layers[1].values == int(MASK.sum())
    values = x.transpose(1, 2)[MASK].numpy()
    ddof = 1 if method == "layerwise" else 0
    second = ((values - values.mean(0)) / np.sqrt(values.var(0, ddof=ddof) + 1e-5)) ** 2
    for layer, of_it in ((model.first, values), (model.second, second)):
        np.testing.assert_allclose(layer.running_mean, of_it.mean(0), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, of_it.var(0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("rest", [(), (torch.randint(3, (7, 5)),), (MASK,), ("names",)])
def test_what_comes_behind_the_input_is_not_looked_at(rest):
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    assert torch.equal(call(Padded(), (x, *rest)), Padded()(x))
