"""Every kind of layer and of input: what counts is what the layer itself would count."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm as torchs
from torch.nn.utils.rnn import pack_sequence

import oracle
from batchnorm import BatchNorm, InputError, Renorm, bank, recalibrate

pytestmark = pytest.mark.usefixtures("kernels")

METHODS = pytest.mark.parametrize("method", ["batch", "layerwise"])


def masked(model, batch):
    return model(*batch)


def expect(layer, x, mask=None, channel_dim=1):
    """float64 to its rounding."""
    _, mean, _, unbiased, _ = oracle.moments(x, mask, channel_dim)
    np.testing.assert_allclose(layer.running_mean, mean.astype(float), rtol=0, atol=1e-13)
    np.testing.assert_allclose(layer.running_var, unbiased.astype(float), rtol=1e-13)


@METHODS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_masks(method, weighted, how):
    """What they leave out is NaN; a batch that is all padding is none."""
    layer, x = BatchNorm(3, dtype=torch.float64), torch.randn(16, 3, 5, dtype=torch.float64)
    mask = torch.rand(16, 5) * 3 if weighted else torch.rand(16, 5) > 0.4
    mask[:6] = 0
    poisoned = x.masked_fill((mask == 0)[:, None], torch.nan)
    batches = list(zip(poisoned.split(6), mask.split(6), strict=True))
    if how == "keyword":
        batches = [{"x": part, "mask": part_mask} for part, part_mask in batches]
        report = recalibrate(layer, batches, method=method)
    else:
        report = recalibrate(layer, batches, method=method, step=masked)
    expect(layer, x, mask)
    assert report.batches == 3
    assert report.layers[0].batches == 2
    assert report.layers[0].values == pytest.approx(float(mask.sum(dtype=torch.float64)), rel=1e-12)


@METHODS
@pytest.mark.parametrize("channel_dim", [0, 2, -1])
def test_channel_axes(method, channel_dim):
    layer = BatchNorm(3, channel_dim=channel_dim, dtype=torch.float64)
    x = torch.randn(3, 8, 3, dtype=torch.float64)
    recalibrate(layer, x.split(3, 1), method=method)
    expect(layer, x, channel_dim=channel_dim)


@METHODS
@pytest.mark.parametrize("size", [None, 2])
def test_packed_sequences(method, size):
    layer = BatchNorm(3, virtual_batch_size=size, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 2, 1, 4, 4, 1)]
    packed = [pack_sequence(sequences[:3]), pack_sequence(sequences[3:])]
    recalibrate(layer, packed, method=method)
    expect(layer, torch.cat(sequences))


#: Batch normalization's options that evaluation does not know of.
OPTIONS = {
    "ghost": {"virtual_batch_size": 4},
    "renorm": {"renorm": Renorm(r_max=1, d_max=0, r_steps=(0, 0), d_steps=(0, 0))},
    "shared": {"process_group": "world"},
    "activation": {"activation": "relu"},
    "module": {"activation": nn.Sequential(nn.PReLU(), nn.BatchNorm1d(5))},
}


def deep(**options):
    return nn.Sequential(BatchNorm(5, **options), nn.Tanh(), BatchNorm(5)).double()


@METHODS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_training_change_nothing(method, options):
    """As if they were not there; an activation comes after, and may have a layer of its own."""
    model, plain = deep(**copy.deepcopy(options)), deep()
    batches = (torch.randn(30, 5, dtype=torch.float64) * 3 + 2).split(7)
    if "activation" in options:
        given = options["activation"]
        plain[0] = nn.Sequential(
            BatchNorm(5), nn.ReLU() if given == "relu" else copy.deepcopy(given)
        ).double()
    for net in (model, plain):
        recalibrate(net, batches, method=method)
    for a, b in zip(
        [m for m in model.modules() if hasattr(m, "running_mean")],
        [m for m in plain.modules() if hasattr(m, "running_mean")],
        strict=True,
    ):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-13, atol=0)
    assert "virtual_batch_size" not in options or model[0].virtual_batch_size == 4


class AndAct(nn.BatchNorm2d):
    """As image models write it: torch's layer with an activation, and its own forward."""

    def __init__(self, channels):
        super().__init__(channels, dtype=torch.float64)
        self.drop, self.act = nn.Dropout(0.9), nn.ReLU()

    def forward(self, x):
        self._check_input_dim(x)
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        y = torchs(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


@METHODS
def test_subclasses_with_a_forward_of_their_own(method):
    model = nn.Sequential(AndAct(3), AndAct(3)).train()
    x = torch.randn(12, 3, 2, 2, dtype=torch.float64) * 2 + 5
    recalibrate(model, [x], method=method)
    expect(model[0], x)
    assert model[0].num_batches_tracked == 1
    # Of one batch, both methods are one but for the variance that normalises.
    _, mean, var, unbiased, _ = oracle.moments(x)
    by = unbiased if method == "layerwise" else var
    h = oracle.forward(x, model[0].weight, model[0].bias, given=(mean, by)).y
    expect(model[1], torch.from_numpy(np.maximum(h, 0).astype(float)))


class OfTwo(nn.Module):
    """A batch through one layer, by keyword."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, a, scale):
        return self.bn(input=a * scale)


@METHODS
def test_batches_of_keyword_arguments_and_layers_called_by_keyword(method):
    model, x = OfTwo(), torch.randn(9, 3, dtype=torch.float64)
    recalibrate(model, [{"a": x[:4], "scale": 2.0}, {"a": x[4:], "scale": 2.0}], method=method)
    expect(model.bn, 2 * x)


@METHODS
def test_a_bank_in_use_is_recalibrated_and_only_that(method):
    model = deep()
    fake = bank(model, "fake")
    x = torch.randn(20, 5, dtype=torch.float64) + 7
    before = copy.deepcopy(model[0].state_dict())
    with fake:
        report = recalibrate(model, x.split(6), method=method)
    expect(model[0].banks.fake, x)
    assert torch.equal(model[0].running_mean, before["running_mean"])
    assert [layer.name for layer in report.layers] == ["0.banks.fake", "2.banks.fake"]
    assert report.left == {"0": "never reached", "2": "never reached"}
    recalibrate(model, (x + 1).split(6), method=method)
    expect(model[0], x + 1)
    expect(model[0].banks.fake, x)


@METHODS
def test_banks_that_a_step_chooses(method):
    """Two kinds of data on their ways through their banks share the passes."""
    model = deep()
    fake = bank(model, "fake")
    real, made = torch.randn(2, 8, 5, dtype=torch.float64) * 2

    def step(model, batch):
        if batch is made:
            with fake:
                return model(batch)
        return model(batch)

    report = recalibrate(model, [real, made], method=method, step=step)
    expect(model[0], real)
    expect(model[0].banks.fake, made)
    assert report.passes == (2 if method == "layerwise" else 1)
    alone = deep()
    recalibrate(alone, [made], method=method)
    torch.testing.assert_close(model[2].banks.fake.running_var, alone[2].running_var)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(method, dtype):
    """Ours keeps float32 statistics; torch's layer what its buffers can hold of exact ones."""
    x = (torch.randn(64, 3) + 100).to(dtype)
    wide = x.double()
    for layer, kept in ((BatchNorm(3), torch.float32), (nn.BatchNorm1d(3), dtype)):
        recalibrate(layer.to(dtype), x.split(10), method=method)
        assert layer.running_mean.dtype == kept
        exact = wide.mean(0).to(kept), wide.var(0).to(kept)
        # One rounding.
        torch.testing.assert_close(layer.running_mean, exact[0], rtol=torch.finfo(kept).eps, atol=0)
        torch.testing.assert_close(layer.running_var, exact[1], rtol=torch.finfo(kept).eps, atol=0)


@METHODS
def test_channels_last_images(method):
    layer = BatchNorm(3, dtype=torch.float64)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    recalibrate(layer, x.split(4), method=method)
    expect(layer, x)


@METHODS
def test_empty_batches_are_none(method):
    layer, x = BatchNorm(3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    report = recalibrate(layer, [x[:0], x[:4], x[:0], x[4:]], method=method)
    expect(layer, x)
    assert (report.batches, report.layers[0].batches) == (4, 2)


def test_one_value_per_channel_is_refused_by_its_name_or_taken_layerwise():
    model, x = deep(), torch.randn(5, 5, dtype=torch.float64)
    with pytest.raises(InputError, match=r"layer '0', BatchNorm\(5\): expected more than 1 value"):
        recalibrate(model, [x[:4], x[4:]])
    recalibrate(model, x.split(1), method="layerwise")
    expect(model[0], x)
    for batches in ([x[:1]], [x[:1], x[:0]]):
        with pytest.raises(InputError, match="layer '0', BatchNorm: expected at least 2 values"):
            recalibrate(model, batches, method="layerwise")


@METHODS
def test_input_that_does_not_fit_is_told_with_the_layers_name(method):
    model = nn.Sequential(nn.Identity(), BatchNorm(3))
    with pytest.raises(InputError, match=r"layer '1', BatchNorm\(3\): expected 3 channels"):
        recalibrate(model, [torch.randn(4, 5)], method=method)
    with pytest.raises(InputError, match=r"layer '', BatchNorm\(3\): expected a mask that broadc"):
        recalibrate(model[1], [(torch.randn(4, 3), torch.ones(7))], method=method, step=masked)
    with pytest.raises(InputError, match="expected mask weights that are finite"):
        recalibrate(model[1], [(torch.randn(4, 3), -torch.ones(4))], method=method, step=masked)
