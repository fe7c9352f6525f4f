"""The operators by themselves: what they refuse, where they write, and the halves of a call."""

import math
from types import SimpleNamespace

import pytest
import torch

from batchnorm import BatchNorm, batch_norm
from batchnorm.kernels import calls, triton
from batchnorm.kernels.triton import launch, operand
from batchnorm.moments import Moments
from triton_steps import CUTS, DEVICE, EPS, PATHS, check, counts, lay, normal, served

each_cut = pytest.mark.parametrize("cut", CUTS, indirect=True)
each_path = pytest.mark.parametrize("cut", PATHS, indirect=True)


def test_what_is_not_served_is_left_untouched():
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def call(**changed):
        arguments = {
            "x": normal(6, 3),
            "weight": None,
            "bias": None,
            "residual": None,
            "mask": None,
            "running_mean": mean,
            "running_var": var,
            "counter": count,
            "momentum": 0.1,
            "eps": 1e-5,
            "channel_dim": 1,
            "flags": calls.TRAINING,
        } | changed
        return triton.forward(**arguments)[-1]

    refused = [
        {"x": normal(3)},
        {"x": normal(0, 3)},
        {"x": normal(1, 3)},
        {"x": normal(6, 4)},
        {"x": torch._neg_view(normal(6, 3))},
        {"channel_dim": 2},
        {"channel_dim": -3},
        {"eps": 0.0},
        {"eps": 1e-31},
        {"eps": math.inf},
        {"eps": math.nan},
        {"momentum": 1.1},
        {"momentum": math.nan},
        {"flags": calls.TRAINING | 3},
        {"flags": calls.TRAINING | 5 << calls.GROUP_BIT},  # one value in the last
        {"weight": normal(4)},
        {"bias": normal(3, 1)},
        {"weight": normal(6)[::2]},
        {"weight": torch._neg_view(normal(3))},
        {"weight": torch.ones(3, dtype=torch.int64, device=DEVICE)},
        {"running_mean": None},
        {"running_var": None},
        {"running_mean": normal(4)},
        {"running_mean": None, "running_var": None, "flags": 0},
        {"counter": torch.tensor(0.0, device=DEVICE)},
        {"counter": torch.zeros(2, dtype=torch.int64, device=DEVICE)},
        {"residual": normal(6, 2)},
        {"residual": normal(6, 3).double()},
        {"residual": torch._neg_view(normal(6, 3))},
    ]
    for changed in refused:
        assert call(**changed) == calls.NOT_SERVED, changed
    assert mean.tolist() == [0] * 3
    assert var.tolist() == [1] * 3
    assert count == 0
    assert call() == call(flags=calls.TRAINING | 6 << calls.GROUP_BIT) == 0
    assert count == 2


def test_gradients_that_are_not_served():
    x, dy = normal(6, 3), normal(6, 3)
    _, statistics, count, _ = triton.forward(
        *(x, *[None] * 7, 0.1, EPS, 1), calls.TRAINING | calls.KEEP
    )
    whole = {"y": None, "weight": None, "bias": None, "mask": None, "eps": EPS, "channel_dim": 1}
    whole |= {"x": x, "dy": dy, "statistics": statistics, "flags": calls.WANT_X}

    def gradient(**changed):
        return triton.backward(**({"sums": None, "count": count} | whole | changed))[-1]

    def reduction(**changed):
        return triton.backward_reduce(**(whole | changed))[-1]

    refused = [
        {"dy": normal(6, 2)},
        {"dy": dy.double()},
        {"dy": torch._neg_view(dy)},
        {"y": normal(3, 6)},
        {"statistics": statistics.float()},
        {"statistics": statistics[0]},
        {"statistics": statistics[:, :2]},
        {"statistics": statistics.T.contiguous().T},
        {"weight": normal(2)},
        {"eps": 0.0},
        {"channel_dim": 2},
        {"flags": 3},
    ]
    for changed in refused:
        assert gradient(**changed) == reduction(**changed) == calls.NOT_SERVED, changed
    # No y to tell the activation's side by.
    flags = calls.WANT_RESIDUAL | calls.ACTIVATIONS["relu"]
    assert gradient(flags=flags) == calls.NOT_SERVED
    assert gradient() == reduction() == 0
    assert triton.moments(x[:0], None, 1, 0)[-1] == calls.NOT_SERVED
    assert triton.moments(x, None, 1, 0)[1:] == (6.0, 0)


def test_negated_views_of_memory():
    """torch has tensors whose sign is a bit of theirs; of a mask too."""
    x, dy = normal(6, 3), normal(6, 3)
    for mask in (None, counts((6, 3), kind=torch.float32)):
        results = []
        for view in (torch.clone, lambda t: torch._neg_view(-t)):
            leaf = view(x).requires_grad_()
            of_mask = None if mask is None else view(mask)
            y = batch_norm(leaf, None, None, training=True, mask=of_mask, activation="relu")
            results.append([y, *torch.autograd.grad(y, leaf, view(dy))])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_path
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", calls.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_halves_of_a_batch_are_the_whole(cut, masked, activation, with_residual):
    """Moments, normalise, reduce, gradient, each by itself: what synchronisation needs."""
    x, residual, dy = (normal(5, 3, 7) + 100 * k for k in (1, 0, 0))
    weight, bias = normal(3), normal(3)
    residual = residual if with_residual else None
    mask = counts(x.shape).unsqueeze(1) if masked else None
    flags = calls.ACTIVATIONS[activation]
    every = calls.TRAINING | calls.WANT_X | (calls.WANT_RESIDUAL if with_residual else 0)

    y, statistics, count, _ = triton.forward(
        *(x, weight, bias, residual, mask, None, None, None, 0.1, EPS, 1),
        calls.TRAINING | calls.KEEP | flags,
    )
    saved = y if with_residual and activation else None
    dx, dz, d_weight, d_bias, _ = triton.backward(
        *(dy, x, saved, statistics, weight, bias, mask, None, count, EPS, 1),
        every | calls.WANT_PARAMETERS | flags,
    )

    parts = [slice(0, 2), slice(2, 5)]
    of = lambda t, part: None if t is None else t[part]  # noqa: E731
    moments = []
    for part in parts:
        (mean, var), n, code = triton.moments(x[part], of(mask, part), 1, 0)
        assert code == 0
        moments.append(Moments(torch.as_tensor(n).to(mean), mean, var * n))
    total = moments[0].merge(moments[1])
    assert total.count == count
    given = torch.stack([total.mean, total.variance()])
    # A thread's few terms in float32, from different pivots.
    torch.testing.assert_close(given, statistics, rtol=1e-6, atol=1e-6)
    sums = 0
    close = {"rtol": 1e-5, "atol": 1e-5}
    for part in parts:
        half, none, _, code = triton.forward(
            *(x[part], weight, bias, of(residual, part), None, *given, None, 0.0, EPS, 1), flags
        )
        assert none is None
        assert code == 0
        torch.testing.assert_close(half, y[part], **close)
        of_part, code = triton.backward_reduce(
            *(dy[part], x[part], of(saved, part), given, weight, bias, of(mask, part), EPS, 1),
            flags,
        )
        assert code == 0
        sums = sums + of_part
    torch.testing.assert_close(sums.flip(0).float(), torch.stack([d_weight, d_bias]), **close)
    for part in parts:
        dx_part, dz_part, *none, code = triton.backward(
            *(dy[part], x[part], of(saved, part), given, weight, bias, of(mask, part)),
            *(sums, count, EPS, 1, every | flags),
        )
        assert none == [None, None]
        assert code == 0
        torch.testing.assert_close(dx_part, dx[part], **close)
        writes = with_residual and (activation is not None or masked)
        assert (dz is not None) == (dz_part is not None) == writes
        if dz is not None:
            assert torch.equal(dz_part, dz[part])


@each_path
@pytest.mark.parametrize("wanted", range(1, 16))
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_any_of_the_inputs(cut, wanted, training):
    """What is not asked for changes nothing of what is."""
    inputs = [normal(4, 3, 5), normal(3), normal(3), normal(4, 3, 5)]
    dy, buffers = normal(4, 3, 5), (normal(3), normal(3).square() + 0.5)
    every = [t.clone().requires_grad_() for t in inputs]
    some = [t.clone().requires_grad_(bool(wanted >> k & 1)) for k, t in enumerate(inputs)]
    results = []
    for leaves in (every, some):
        x, weight, bias, residual = leaves
        y = batch_norm(
            *(x, *(b.clone() for b in buffers), weight, bias, training),
            residual=residual,
            activation="relu",
        )
        asked = [leaf for leaf, t in zip(leaves, some, strict=True) if t.requires_grad]
        assert served(y)
        results.append(torch.autograd.grad(y, asked, dy))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


class Guarded(SimpleNamespace):
    """torch, but memory that is asked for has NaN before, behind and in it."""

    PAD = 64

    def __init__(self):
        self.storages = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def inside(self, size, stride, dtype):
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        storage = torch.full((extent + 2 * self.PAD,), torch.nan, dtype=dtype, device=DEVICE)
        self.storages.append(storage)
        return storage.as_strided(size, stride, self.PAD)

    def empty(self, *size, dtype, device):
        size = size if isinstance(size[0], int) else tuple(size[0])
        return self.inside(size, torch.empty(size, device="meta").stride(), dtype)

    def empty_like(self, x, dtype=None):
        return self.inside(x.shape, x.stride(), dtype or x.dtype)

    def copy(self, x):
        """The same tensor, where what lies around it is NaN too."""
        return self.inside(x.shape, x.stride(), x.dtype).copy_(x)

    def check(self):
        for storage in self.storages:
            assert storage[: self.PAD].isnan().all()
            assert storage[-self.PAD :].isnan().all()


@each_cut
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((7, 5), "contiguous"), ((2, 3, 11), "contiguous"), ((2, 5, 3), "channels_last")],
    ids=str,
)
def test_memory_of_others_is_neither_read_nor_written(cut, shape, layout, monkeypatch):
    guarded = Guarded()
    monkeypatch.setattr(operand, "torch", guarded)
    monkeypatch.setattr(launch, "torch", guarded)
    x, residual, dy = (guarded.copy(lay(normal(*shape), layout)) for _ in range(3))
    mask = guarded.copy(counts(shape, kind=torch.float32))
    for training in (True, False):
        for extras in ({}, {"mask": mask, "residual": residual}):
            check(x, dy=dy, training=training, activation="relu", **extras)
    bn = BatchNorm(shape[1], device=DEVICE)
    vectors = {k: guarded.copy(v) for k, v in bn.state_dict().items() if v.dim()}
    y = torch.func.functional_call(bn, vectors, (x,))
    torch.testing.assert_close(y, BatchNorm(shape[1], device=DEVICE)(x))
    assert len(guarded.storages) > 10
    guarded.check()


@each_cut
@pytest.mark.parametrize("shape", [(9, 5), (2, 3, 11)], ids=str)
def test_same_call_same_bits(cut, shape):
    x, dy = normal(*shape), normal(*shape)

    def run():
        leaf, bn = x.clone().requires_grad_(), BatchNorm(shape[1], activation="relu", device=DEVICE)
        y = bn(leaf)
        grads = torch.autograd.grad(y, (leaf, bn.weight, bn.bias), dy)
        return [y.detach(), bn.running_mean, bn.running_var, *grads]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_same_bits_where_a_gpu_runs_many_programs_at_once():
    x, dy = normal(2500, 5), normal(2500, 5)
    run = lambda: triton.forward(*(x, *[None] * 7, 0.1, EPS, 1), calls.TRAINING)  # noqa: E731
    y, statistics, count, _ = run()
    gradients = lambda: triton.backward(  # noqa: E731
        *(dy, x, None, statistics, None, None, None, None, count, EPS, 1),
        calls.TRAINING | calls.WANT_X | calls.WANT_PARAMETERS,
    )
    first = [y, statistics, *gradients()]
    for _ in range(1 if triton.INTERPRETED else 50):
        y, again, *_ = run()
        for a, b in zip(first, [y, again, *gradients()], strict=True):
            assert a is b or a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b)


@each_path
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(cut, training):
    """By the reference, in float64 and through the moments."""
    shape, results = (4, 3, 5), []
    inputs = [normal(*shape), normal(3), normal(3), normal(*shape)]
    dy, directions = normal(*shape), [normal(*shape), normal(3), normal(3)]
    for dtype in (torch.float32, torch.float64):
        x, weight, bias, residual = (t.to(dtype).requires_grad_() for t in inputs)
        buffers = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        y = batch_norm(
            *(x, *buffers, weight, bias, training), activation="leaky_relu", residual=residual
        )
        assert served(y) == (dtype is torch.float32)
        leaves, given = (x, weight, bias), dy.to(dtype).requires_grad_()
        grads = torch.autograd.grad(y, leaves, given, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        results.append(torch.autograd.grad(along, (x, weight, given)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
