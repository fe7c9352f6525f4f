"""What the layer and the functions make of kernels: gradients, hooks, who else serves."""

import contextlib

import pytest
import torch

import oracle
from batchnorm import (
    ArgumentError,
    BatchNorm,
    InputError,
    Renorm,
    accumulate_statistics,
    batch_norm,
)
from interpreted import KERNELS, float64_only, leave_out, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("wanted", range(1, 16))
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "activation"), [((6, 3), "relu"), ((2, 3, 40), "leaky_relu"), ((2, 3, 40), None)]
)
def test_gradients_of_any_of_the_inputs(wanted, affine, training, shape, activation):
    x, residual = torch.randn(2, *shape)
    weight = torch.randn(3) if affine in ("both", "weight") else None
    bias = torch.randn(3) if affine in ("both", "bias") else None
    inputs = [x, weight, bias, residual]
    results = []
    for name in (KERNELS.NAME, None):
        leaves = [
            None if t is None else t.clone().requires_grad_(bool(wanted >> k & 1))
            for k, t in enumerate(inputs)
        ]
        asked = [t for t in leaves if t is not None and t.requires_grad]
        if not asked:
            pytest.skip("nothing is asked for")
        with pytest.MonkeyPatch.context() as patch:
            if name is None:
                leave_out(patch)
            statistics = torch.zeros(3), torch.ones(3)
            y = batch_norm(
                leaves[0],
                *statistics,
                *leaves[1:3],
                training,
                residual=leaves[3],
                activation=activation,
            )
            assert (y.grad_fn.backend == KERNELS.NAME) == (name is not None)
            torch.manual_seed(1)
            results.append(torch.autograd.grad(y, asked, torch.randn(shape)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_raises_afterwards_has_changed_nothing():
    def pack(tensor):
        raise ValueError

    def fails(y):
        raise ValueError

    x = torch.randn(6, 3)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    for bn, around in (
        (BatchNorm(3, activation=fails), contextlib.nullcontext()),
        (BatchNorm(3), hooks),
    ):
        with pytest.raises(ValueError), around:  # noqa: PT011
            bn(x)
        assert bn.num_batches_tracked == 0
        assert torch.equal(bn.running_mean, torch.zeros(3))
        assert torch.equal(bn.running_var, torch.ones(3))


def test_what_autograd_cannot_save_has_changed_nothing():
    with torch.inference_mode():
        frozen, mask = torch.ones(3), torch.ones(6)
    x = torch.randn(6, 3, requires_grad=True)
    for weight, counts in ((frozen, None), (None, mask)):
        mean, var = torch.zeros(3), torch.ones(3)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            batch_norm(x, mean, var, weight, None, True, mask=counts, activation="relu")
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.ones(3))
    with (
        torch.inference_mode(),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="Inference tensors cannot be saved"),
    ):
        batch_norm(x, mean, var, training=True)
    assert torch.equal(mean, torch.zeros(3))
    # The kernels would save this one, the others need not.
    assert batch_norm(x, mean, var, None, frozen, True, activation="relu").requires_grad
    assert not torch.equal(mean, torch.zeros(3))


def test_an_update_that_comes_later_is_the_same_update():
    x = torch.randn(6, 3)
    for momentum in (0.3, None):
        fused, later = BatchNorm(3, momentum=momentum), BatchNorm(3, momentum=momentum)
        later.activation = lambda y: y
        for _ in range(3):
            fused(x)
            later(x)
        assert torch.equal(fused.running_mean, later.running_mean)
        assert torch.equal(fused.running_var, later.running_var)
        assert fused.num_batches_tracked == later.num_batches_tracked == 3


def test_checkpointing_that_stops_early_counts_once():
    """Of a layer that comes last, torch's recomputation sees the inputs only."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), BatchNorm(3))
    x = torch.randn(6, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).square().sum().backward()
    assert net[1].num_batches_tracked == 1


def test_hooks_that_bring_back_other_strides():
    def unpack(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    x, dy = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    for weight in (torch.randn(3, requires_grad=True), None):
        leaves = (x,) if weight is None else (x, weight)
        want = torch.autograd.grad(batch_norm(x, None, None, weight, training=True), leaves, dy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
            y = batch_norm(x, None, None, weight, training=True)
        for a, b in zip(torch.autograd.grad(y, leaves, dy), want, strict=True):
            torch.testing.assert_close(a, b)


def test_left_to_others():
    """What the kernels cannot do is done otherwise, or refused in the usual words."""
    x = torch.randn(6, 3)
    with pytest.raises(ArgumentError, match="activation"):
        batch_norm(x, None, None, training=True, activation=3)
    half, single = torch.ones(3).half().requires_grad_(), torch.zeros(3, requires_grad=True)
    y = batch_norm(x, None, None, half, single, True)
    (d_bias,) = torch.autograd.grad(y, single, torch.full((6, 3), 3e4))
    assert d_bias.tolist() == [180000.0] * 3  # infinity in half precision
    for with_grad in (0, 1):
        buffers = [torch.zeros(3), torch.ones(3)]
        buffers[with_grad].requires_grad_()
        with pytest.raises(RuntimeError, match="requires grad"):
            batch_norm(x, *buffers, training=True)
    with pytest.raises(ArgumentError, match="eps"):
        batch_norm(x, None, None, training=True, eps="1")
    with pytest.raises(InputError, match="channel axis"):
        batch_norm(x, None, None, training=True, channel_dim=2**63)
    bn = BatchNorm(3)
    bn.num_batches_tracked = torch.tensor(0, device="meta")
    bn(x)
    assert not torch.equal(bn.running_mean, torch.zeros(3))


def test_the_gradient_of_a_residual_under_a_mask_is_the_same_to_any_order():
    x, residual = torch.randn(3, 2), torch.randn(3, 2, requires_grad=True)
    x[1, 0] = torch.nan
    mask, dy = torch.tensor([True, False, True]), torch.ones(3, 2)
    y = batch_norm(x, None, None, training=True, mask=mask, residual=residual)
    (first,) = torch.autograd.grad(y, residual, dy, retain_graph=True)
    (again,) = torch.autograd.grad(y, residual, dy, create_graph=True)
    assert torch.equal(first, again)
    assert first[1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", [None, torch.tanh])  # the second: a separate update
def test_what_autograd_saved_of_the_buffers_is_known_to_have_changed(momentum, activation):
    """The kernels write behind autograd's back; a silently wrong gradient would come of it."""
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        bn = BatchNorm(3, momentum=momentum, activation=activation)
        scale = torch.ones(3, requires_grad=True)
        loss = (scale * getattr(bn, name)).sum()
        bn(torch.randn(6, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@float64_only
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_second_order_with_an_activation_and_no_residual(training, affine, activation, size):
    """y is not kept: the activation's side is computed again, by the reference."""
    x, dy = torch.randn(2, 5, 2, 3).double()
    parameters = [torch.randn(2).double() for _ in range(2)] if affine else [None, None]
    statistics = torch.randn(2).double(), torch.rand(2).double() + 0.5
    results = []
    for served in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *parameters)]
        wanted = [t for t in leaves if t is not None]
        with pytest.MonkeyPatch.context() as patch:
            if not served:
                leave_out(patch)
            y = batch_norm(
                *(leaves[0], *(s.clone() for s in statistics), *leaves[1:], training),
                activation=activation,
                virtual_batch_size=size,
            )
            first = torch.autograd.grad(y, wanted, dy, create_graph=True)
            # Not all are functions of an input: in evaluation dx is none of x.
            functions = [f for f in first if f.requires_grad]
            torch.manual_seed(1)
            cotangents = [torch.randn_like(f) for f in functions]
            second = (
                torch.autograd.grad(functions, wanted, cotangents, allow_unused=True)
                if functions
                else ()
            )
        assert len(functions) == (2 if affine else int(training))
        assert (getattr(y.grad_fn, "backend", None) == KERNELS.NAME) == served
        results.append([*first, *(s for s in second if s is not None)])
    # float64, and sums of some 15 terms.
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_statistics_that_others_take_in_are_the_batchs():
    """Whatever an activation makes of the shape, and without x's graph."""
    x = torch.randn(8, 4, 5, requires_grad=True)
    options = ({}, {"virtual_batch_size": 3}, {"renorm": Renorm(r_steps=(0, 0), d_steps=(0, 0))})
    for option in options:
        bn, plain = (
            BatchNorm(4, activation=a, **option)
            for a in (lambda y: torch.cat([y, y], 1)[:, :7], None)
        )
        with accumulate_statistics(bn):
            assert bn(x).shape == (8, 7, 5)
            bn(x[:3])
        taken = []
        plain._collect = lambda layer, bank, moments, taken=taken: taken.append(moments)
        plain(x)
        assert not any(t.requires_grad for m in taken for t in (m.count, m.mean, m.m2))
        want = oracle.forward(torch.cat([x, x[:3]]))
        mean, var = oracle.running(torch.zeros(4), torch.ones(4), want, 0.1)
        for got, value in ((bn.running_mean, mean), (bn.running_var, var)):
            assert (abs(oracle.wide(got) - value) <= 2.0**-23 * (abs(value) + 1)).all()
        assert bn.num_batches_tracked == 1
