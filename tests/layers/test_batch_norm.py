"""What the layer adds to the function: its state, its name in messages, its masks and packs."""

import copy
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import oracle
from batchnorm import BatchNorm, InputError, batch_norm
from interpreted import too_large, warns_of_non_finite

pytestmark = pytest.mark.usefixtures("kernels")


def test_training_with_a_mask_uses_what_counts_only():
    lengths = torch.tensor([7, 5, 2, 1])
    mask = torch.arange(7) < lengths[:, None]
    x = torch.randn(4, 3, 7) * 2 + 5
    clean = BatchNorm(3)
    valid = clean(x.permute(0, 2, 1)[mask])
    for junk in (0.0, torch.nan, torch.inf, 1e30):
        bn = BatchNorm(3)
        padded = torch.where(mask[:, None], x, junk).requires_grad_()
        y = bn(padded, mask)
        # The same elements, summed in another order, by other kernels: 64 float32 roundings.
        torch.testing.assert_close(y.permute(0, 2, 1)[mask], valid, rtol=0, atol=64 * 2.0**-24 * 3)
        torch.testing.assert_close(bn.running_mean, clean.running_mean)
        torch.testing.assert_close(bn.running_var, clean.running_var)
        dy = torch.where(mask[:, None], torch.randn(4, 3, 7), 0.0)
        grads = torch.autograd.grad(y, (padded, bn.weight, bn.bias), dy)
        assert all(g.isfinite().all() for g in grads)


def test_non_finite_batches_are_told_once_with_the_layers_name():
    net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(BatchNorm(3), nn.ReLU()))
    bad = torch.full((5, 4), torch.nan)
    named = r"layer '1\.0', BatchNorm\(3\): .*NaN or infinity"
    with warns_of_non_finite(bad.dtype, match=named):
        net(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(bad)
    bn = net[1][0]
    assert torch.equal(bn.running_mean, torch.zeros(3))
    assert torch.equal(bn.running_var, torch.ones(3))
    net(torch.randn(5, 4))
    assert bn.running_mean.abs().min() > 0


def test_packed_sequences():
    lengths = torch.tensor([2, 6, 4])
    x, residual = torch.randn(2, 3, 6, 5)
    pack = lambda t: pack_padded_sequence(  # noqa: E731
        t, lengths, batch_first=True, enforce_sorted=False
    )
    packed, other = pack(x), pack(residual)
    bn, plain = BatchNorm(5, activation="relu"), BatchNorm(5)
    y = bn(packed, residual=other)
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.data, torch.relu(plain(packed.data) + other.data))
    assert torch.equal(y.batch_sizes, packed.batch_sizes)
    assert torch.equal(y.unsorted_indices, packed.unsorted_indices)
    assert torch.equal(bn.running_var, plain.running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_counter_and_buffers(momentum, track):
    bn = BatchNorm(3, momentum=momentum, track_running_stats=track)
    batches = torch.randn(4, 6, 3)
    for x in batches:
        bn(x)
    if not track:
        assert bn.running_mean is None
        assert bn.num_batches_tracked is None
        x = batches[0]
        assert torch.equal(bn.eval()(x), bn.train()(x))
        return
    assert bn.num_batches_tracked.item() == 4
    if momentum is None:
        torch.testing.assert_close(bn.running_mean, batches.mean((0, 1)))
        torch.testing.assert_close(bn.running_var, batches.var(1).mean(0))
    bn.reset_running_stats()
    assert torch.equal(bn.running_var, torch.ones(3))


def test_an_empty_batch_is_no_batch():
    bn = BatchNorm(3, momentum=None)
    bn(torch.randn(5, 3))
    before = copy.deepcopy(bn.state_dict())
    assert bn(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    for name, value in bn.state_dict().items():
        assert torch.equal(value, before[name])


def test_training_with_tracking_switched_off_later_leaves_the_buffers():
    """torch's own trick to pause the statistics: track_running_stats = False on a live layer."""
    bn = BatchNorm(3)
    bn.track_running_stats = False
    x = torch.randn(5, 3)
    y = bn(x)
    assert torch.equal(bn.running_mean, torch.zeros(3))
    assert torch.equal(y, batch_norm(x, None, None, bn.weight, bn.bias, True))


def test_an_activation_module_is_part_of_the_layer():
    bn = BatchNorm(3, activation=nn.PReLU(3))
    assert "activation.weight" in bn.state_dict()
    x = torch.randn(6, 3)
    y = bn(x)
    y.square().mean().backward()
    assert bn.activation.weight.grad.abs().sum() > 0


def test_the_innermost_layer_names_itself_in_an_error():
    net = nn.Sequential(BatchNorm(3, activation=BatchNorm(4)))
    with pytest.raises(InputError) as caught:
        net(torch.randn(6, 3))
    assert str(caught.value).count("layer '") == 1
    assert "layer '0.activation'" in str(caught.value)


def test_buffers_taken_away():
    """To normalise by the batch in evaluation too, people set torch's buffers to None."""
    bn = BatchNorm(3)
    bn.running_mean = bn.running_var = None
    x = torch.randn(5, 3)
    for mode in (True, False):
        assert torch.equal(bn.train(mode)(x), batch_norm(x, None, None, training=True))


def test_repr_says_what_differs_from_torchs():
    assert repr(BatchNorm(3)) == repr(nn.BatchNorm1d(3)).replace("BatchNorm1d", "BatchNorm")
    shown = repr(BatchNorm(3, channel_dim=-1, activation="relu"))
    assert shown.endswith("channel_dim=-1, activation='relu')")
    assert "activation='tanh'" in repr(BatchNorm(3, activation=torch.tanh))


def test_torch_fx_takes_it_as_one_node():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4), nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "0",
        "1",
        "2",
    ]
    x = torch.randn(2, 3, 6, 6)
    reference = copy.deepcopy(net)
    assert torch.equal(traced(x), reference(x))
    assert torch.equal(traced.get_submodule("1").running_mean, reference[1].running_mean)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm(4, activation="relu")

        def forward(self, x, mask, skip):
            return self.bn(x, mask, residual=skip)

    block = Block()
    x, skip = torch.randn(2, 5, 4)
    mask = torch.rand(5) > 0.2
    want = copy.deepcopy(block)(x, mask, skip)
    assert torch.equal(torch.fx.symbolic_trace(block)(x, mask, skip), want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torch_jit_trace_in_evaluation():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4, activation="relu"))
    net(torch.randn(8, 3, 6, 6))
    net.eval()
    traced = torch.jit.trace(net, torch.randn(2, 3, 6, 6))
    assert "aten::batch_norm" in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(traced(x), net(x))


def test_integers_of_any_kind():
    bn = BatchNorm(np.int64(4), channel_dim=np.int32(-1))
    assert type(bn.num_features) is int
    assert type(bn.channel_dim) is int
    bn(torch.randn(3, 2, 4))


@pytest.mark.parametrize("bad", [[0, 1, 2], [1]])
def test_a_plain_average_has_no_part_of_a_refused_batch(bad):
    bn, clean = BatchNorm(3, momentum=None), BatchNorm(3, momentum=None)
    poisoned = torch.randn(8, 3)
    poisoned[0, bad] = torch.nan
    with warns_of_non_finite(poisoned.dtype):
        bn(poisoned)
    assert bn.num_batches_tracked == 0
    for _ in range(2):
        x = torch.randn(8, 3) + 10
        bn(x)
        clean(x)
    for got, want in zip(bn.buffers(), clean.buffers(), strict=True):
        assert torch.equal(got, want)


def test_with_a_momentum_a_batch_counts_if_any_channel_took_it_in():
    bn = BatchNorm(3)
    x = torch.randn(8, 3)
    x[0, 1] = torch.nan
    with warns_of_non_finite(x.dtype):
        bn(x)
    assert bn.num_batches_tracked == 1
    bn(torch.full((8, 3), torch.nan))
    assert bn.num_batches_tracked == 1


def test_running_statistics_that_were_broken_already_are_not_the_batchs_fault():
    bn = BatchNorm(3)
    bn.running_mean[1] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn(torch.randn(8, 3))
    assert bn.running_mean.isnan().tolist() == [False, True, False]


def test_naming_the_layer_keeps_nothing_alive():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm(3)

        def forward(self, x):
            big = torch.randn(1000)
            alive = weakref.ref(big)
            with warns_of_non_finite(x.dtype, match="layer 'bn'"):
                self.bn(x)
            del big
            return alive()

    gc.disable()
    try:
        assert Net()(torch.full((4, 3), torch.nan)) is None
    finally:
        gc.enable()


def test_the_default_device_and_dtype_do_not_matter():
    x = torch.randn(8, 3)
    want = BatchNorm(3)
    y = want(x)
    bn = BatchNorm(3)
    with torch.device("meta"):
        assert torch.equal(bn(x), y)
    try:
        torch.set_default_dtype(torch.bfloat16)
        bn.reset_running_stats()
        assert torch.equal(bn(x), y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bn.running_var, want.running_var)


@pytest.mark.parametrize("rows", [64, pytest.param(70_000, marks=too_large)])
def test_vmap_over_parameters_in_float32(rows):
    """Where the input itself is not mapped, and in every size: other kernels would serve."""
    x, weights = torch.randn(rows, 3), torch.randn(2, 3)
    for training in (True, False):
        statistics = (None, None) if training else (torch.zeros(3), torch.ones(3))

        def call(weight, residual, statistics=statistics, training=training):
            return batch_norm(x, *statistics, weight, None, training, residual=residual)

        residuals = torch.randn(2, rows, 3)
        got = torch.func.vmap(call)(weights, residuals)
        want = torch.stack([call(w, r) for w, r in zip(weights, residuals, strict=True)])
        # Computed in float64 on one side and by torch's float32 kernels on the other.
        torch.testing.assert_close(got, want, rtol=0, atol=64 * 2.0**-24 * 5)


@too_large
def test_two_threads():
    torch.set_num_threads(2)
    try:
        for x in (torch.randn(64, 6, 20, 20) + 1e4, torch.randn(64, 6, 20, 20) + 1):
            first, second = BatchNorm(6), BatchNorm(6)
            y = first(x)
            assert torch.equal(y, second(x))
            assert torch.equal(first.running_var, second.running_var)
            want = oracle.forward(x)
            assert (abs(oracle.wide(y) - want.y) <= 64 * 2.0**-24 * 8).all()
    finally:
        torch.set_num_threads(1)
