"""forward_together is the large batch: outputs, gradients of any order, statistics, errors."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import oracle
from batchnorm import (
    ArgumentError,
    BatchNorm,
    InputError,
    NonFiniteWarning,
    Renorm,
    accumulate_statistics,
    bank,
    forward_together,
    freeze,
    pause_statistics,
)

pytestmark = pytest.mark.usefixtures("kernels")

FULL = Renorm(r_max=1.5, d_max=0.5, r_steps=(0, 0), d_steps=(0, 0))
SPLIT = [7, 1, 4]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class Block(nn.Module):
    """Convolutions, with a residual, a mask and one layer that is called twice."""

    def __init__(self, dtype=torch.float64, again=True, **options):
        super().__init__()
        self.again = again
        self.lift = nn.Conv1d(2, 3, 3, padding=1, dtype=dtype)
        self.first = BatchNorm(3, activation="relu", dtype=dtype, **options)
        self.twice = BatchNorm(3, activation=torch.tanh, dtype=dtype, **options)
        self.mix = nn.Conv1d(3, 3, 1, dtype=dtype)
        with torch.no_grad():
            for layer in (self.first, self.twice):
                for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
                    tensor.uniform_(0.5, 1.5)

    def forward(self, x, mask=None):
        h = self.lift(x)
        h = self.first(h, mask, residual=h)
        h = self.twice(self.mix(h), mask)
        return self.twice(self.mix(h), mask) if self.again else h


def data(dtype=torch.float64):
    return torch.randn(sum(SPLIT), 2, 5, dtype=dtype) * 2 + 1


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def close(got, expected, tolerance):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


def switches(model):
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    return [(m._together, m._collect, m._bank, m.track_running_stats) for m in layers]


def run(model, batch, how, second_order=True):
    """Outputs, gradients of everything and gradients of a gradient, buffers."""
    x, mask = batch
    x = x.clone().requires_grad_()
    y = how(model, x, mask)
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(y, leaves, cotangent, create_graph=second_order)
    results = [y, *first]
    if second_order:
        vectors = [
            torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype)
            for g in first
        ]
        total = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        results += torch.autograd.grad(total, leaves)
    return [r.detach() for r in (*results, *(b.double() for b in model.buffers()))]


def whole(model, x, mask):
    return model(x, mask)


def together(model, x, mask, **options):
    parts = zip(x.split(SPLIT), (None,) * 3 if mask is None else mask.split(SPLIT), strict=True)
    step = lambda net, part: net(*part)  # noqa: E731
    return torch.cat(forward_together(model, list(parts), step=step, **options))


MASKS = {
    "all": None,
    "bool": torch.rand(sum(SPLIT), 5, generator=torch.Generator().manual_seed(0)) > 0.3,
    "weights": torch.rand(sum(SPLIT), 5, generator=torch.Generator().manual_seed(0)) * 3,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"renorm": FULL, "again": False}, {"bias": False}],
    ids=["plain", "average", "renorm", "no bias"],
)
def test_is_the_large_batch(options, mask):
    """To second order, in float64: 1e-10 is a thousand times what the sums round by."""
    model = Block(**options)
    twin, batch = copy.deepcopy(model), (data(), mask)
    close(run(model, batch, together), run(twin, batch, whole), 1e-10)
    assert model.first.num_batches_tracked == 1
    assert model.twice.num_batches_tracked == (2 if model.again else 1)


def test_float32():
    """As near to float64 as the large batch is, within a few roundings of values up to 20."""
    model, batch = Block(torch.float32), (data(torch.float32), MASKS["bool"])
    exact = run(copy.deepcopy(model).double(), (batch[0].double(), batch[1]), whole, False)
    for got, expected in zip(run(model, batch, together, False), exact, strict=True):
        size = max(1, float(expected.abs().max()))
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6 * size)


def test_values_against_the_oracle():
    layer, x = BatchNorm(3, activation="relu"), torch.randn(12, 3, 4) + 1e4
    residual, dy = torch.randn(2, 12, 3, 4)
    leaf = x.clone().requires_grad_()
    parts = list(zip(leaf.split(SPLIT), residual.split(SPLIT), strict=True))
    y = torch.cat(forward_together(layer, parts, step=lambda m, p: m(p[0], residual=p[1])))
    f = oracle.forward(x, residual=residual, activation="relu")
    dx, *_ = oracle.backward(dy, x, residual=residual, activation="relu")
    # float64 statistics, results of size 5 and rounded once: 5·2⁻²⁴, and the offset's 1e4·2⁻⁵³.
    assert abs(oracle.wide(y) - f.y).max() < 5e-7
    (got,) = torch.autograd.grad(y, leaf, dy)
    assert abs(oracle.wide(got) - dx).max() < 5e-7
    mean, var = oracle.running(torch.zeros(3), torch.ones(3), f, 0.1)
    assert abs(oracle.wide(layer.running_mean) - mean).max() < 1e3 * 2**-24
    assert abs(oracle.wide(layer.running_var) - var).max() < 2**-24


def test_offload_gives_the_same_bits_and_saves_nothing_twice():
    model, batch = Block(), (data(), None)
    twin = copy.deepcopy(model)
    got = run(model, batch, lambda *args: together(*args, offload=True))
    assert all(torch.equal(g, e) for g, e in zip(got, run(twin, batch, together), strict=True))


def test_gradient_needs_no_more_than_what_asks():
    """γ, β and a residual that want none, x that wants none."""
    model, x = Block(), data()
    for name in ("first.weight", "twice.bias", "lift.weight", "lift.bias"):
        model.get_parameter(name).requires_grad_(False)
    twin = copy.deepcopy(model)
    results = []
    for net, how in ((model, together), (twin, whole)):
        leaves = [p for p in net.parameters() if p.requires_grad]
        y = how(net, x, None)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append(torch.autograd.grad(y, leaves, cotangent))
    close(*results, 1e-10)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = BatchNorm(3, dtype=torch.float64)

    def forward(self, x, scale=1.0):
        return self.bn(x) * scale


BATCHES = {
    "tensors": lambda part: part,
    "tuples": lambda part: (part, "a label"),
    "lists": lambda part: [part, "a label"],
    "dicts": lambda part: {"x": part, "scale": 1.0},
}


@pytest.mark.parametrize("wrap", BATCHES.values(), ids=BATCHES)
def test_kinds_of_batches(wrap):
    model, x = Named(), torch.randn(12, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    outputs = forward_together(model, (wrap(part) for part in x.split(SPLIT)))
    assert [len(y) for y in outputs] == SPLIT
    close([torch.cat(outputs)], [twin(x)], 1e-14)


def test_packed_sequences():
    layer = BatchNorm(3, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 3, 2, 4)]
    packs = [pack_sequence(part, enforce_sorted=False) for part in (sequences[:3], sequences[3:])]
    outputs = forward_together(layer, packs)
    every = torch.cat(sequences)
    expected = (every - every.mean(0)) / (every.var(0, correction=0) + 1e-5).sqrt()
    close([outputs[1].data], [expected[10:]], 1e-14)
    assert torch.equal(outputs[0].batch_sizes, packs[0].batch_sizes)


def test_step_returns_what_it_wants_in_order_and_one_at_a_time():
    model, x = Named(), torch.randn(12, 3, dtype=torch.float64)
    order = []

    def step(net, part):
        order.append(("in", len(part)))
        loss = net(part).square().sum()
        order.append(("out", len(part)))
        return {"loss": loss, "size": len(part)}

    results = forward_together(model, x.split(SPLIT), step=step)
    assert [result["size"] for result in results] == SPLIT
    assert order == [(way, n) for way in ("in", "out") for n in SPLIT]
    # Σ x̂² = n·σ²/(σ² + eps), whatever the split.
    var = x.var(0, correction=0)
    close([sum(r["loss"] for r in results)], [(12 * var / (var + 1e-5)).sum()], 1e-12)


def test_no_and_one_micro_batch():
    model, x = Block(), data()
    before = buffers(model)
    assert forward_together(model, []) == []
    assert unchanged(model, before)
    twin = copy.deepcopy(model)
    close(forward_together(model, [x]), [twin(x)], 1e-12)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_evaluation_and_frozen_layers_have_nothing_to_wait_for():
    model, x = Block(), data()
    model.first.eval()
    freeze(model.twice)
    before, twin = buffers(model), copy.deepcopy(model)
    close([together(model, x, None)], [twin(x)], 1e-12)
    assert unchanged(model, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model, x = Block(), data()
    twin = copy.deepcopy(model)
    with context():
        y = together(model, x, None)
        assert not y.requires_grad
        close([y], [twin(x)], 1e-12)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_autocast():
    """The surroundings of the call are those of each micro-batch."""
    model = nn.Sequential(nn.Linear(2, 3), BatchNorm(3))
    twin, x, cotangent = copy.deepcopy(model), torch.randn(12, 2), torch.randn(12, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.cat(forward_together(model, x.split(SPLIT)))
        expected = twin(x)
    (y.float() * cotangent).sum().backward()
    assert y.dtype is expected.dtype is torch.bfloat16
    assert model[0].weight.grad.dtype is torch.float32
    # One rounding to bfloat16 of the same numbers, below 4.
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=0)
    close(model.buffers(), twin.buffers(), 1e-6)
    # Twelve terms of size 4, whose factors bfloat16 rounded by 2⁻⁹ of their sizes.
    exact = nn.Sequential(nn.Linear(2, 3), BatchNorm(3)).double()
    exact.load_state_dict(twin.double().state_dict())
    exact(x.double()).backward(cotangent.double())
    for name, parameter in model.named_parameters():
        expected = exact.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=0, atol=0.2)


def test_default_device():
    """What a model makes itself, it makes where the caller's would be made."""
    model = Named()
    devices = []

    def step(net, part):
        devices.append(torch.empty(1).device.type)
        return net(part)

    batches = torch.randn(8, 3, dtype=torch.float64).split(4)
    with torch.device("meta"):
        forward_together(model, batches, step=step)
    assert devices == ["meta", "meta"]


def test_an_error_in_one_is_the_callers():
    model, x = Block(), data()
    before, state = buffers(model), switches(model)

    def step(net, part):
        y = net(part)
        if len(part) == 1:
            raise ZeroDivisionError("of the second micro-batch")
        return y

    with pytest.raises(ZeroDivisionError, match="of the second"):
        forward_together(model, x.split(SPLIT), step=step)
    assert unchanged(model, before)
    assert switches(model) == state
    twin = copy.deepcopy(model)
    close([together(model, x, None)], [twin(x)], 1e-12)


def test_those_left_waiting_clean_up_behind_themselves():
    model, x, seen = Block(), data(), []

    def step(net, part):
        try:
            if len(part) == 4:
                raise ZeroDivisionError
            return net(part)
        except Exception:
            seen.append("caught")
            raise
        finally:
            seen.append(len(part))

    with pytest.raises(ZeroDivisionError):
        forward_together(model, x.split(SPLIT), step=step)
    # The others do not take their end for an error of the model's.
    assert seen == ["caught", 4, 7, 1]


def test_different_paths():
    model, x = Block(), data()
    before, state = buffers(model), switches(model)

    def step(net, part):
        return net.first(net.lift(part)) if len(part) > 1 else net.twice(net.lift(part))

    with pytest.raises(InputError, match="same batch norm layers in one order, got one at Batch"):
        forward_together(model, x.split(SPLIT), step=step)
    with pytest.raises(InputError, match=r"one at BatchNorm.*, one done"):
        forward_together(
            model, x.split(SPLIT), step=lambda net, p: net(p) if len(p) > 1 else net.lift(p)
        )
    # One ends where the others pass the same layer again.
    with pytest.raises(InputError, match=r"one at BatchNorm.*, one done"):
        forward_together(
            nn.Sequential(model.twice),
            torch.randn(12, 3, 5, dtype=torch.float64).split(SPLIT),
            step=lambda net, p: net(net(p)) if len(p) > 1 else net(p),
        )
    assert unchanged(model, before)
    assert switches(model) == state


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_within_is_refused(reentrant):
    model, x = Block(), data().requires_grad_()
    before = buffers(model)

    def step(net, part):
        return checkpoint(net, part, use_reentrant=reentrant)

    for offload in (False, True):
        with pytest.raises(InputError, match=r"layer 'first'.*offload=True"):
            forward_together(model, x.split(SPLIT), step=step, offload=offload)
    assert unchanged(model, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_counts_once(reentrant):
    model, x = Block(), data()
    twin = copy.deepcopy(model)
    results = []
    for net, function in (
        (model, lambda leaf: checkpoint(together, model, leaf, None, use_reentrant=reentrant)),
        (twin, twin),
    ):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        y.backward(cotangent)
        results.append((y, leaf.grad, *(p.grad for p in net.parameters())))
    close(*results, 1e-10)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_ghost_batches_are_refused_by_name():
    model = nn.Sequential(BatchNorm(3), BatchNorm(3, virtual_batch_size=2))
    with pytest.raises(ArgumentError, match=r"without virtual_batch_size.*at '1'"):
        forward_together(model, [torch.randn(4, 3)])


def test_one_value_in_all_is_refused_by_name_and_two_are_not():
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    x, before = torch.randn(2, 3, dtype=torch.float64), buffers(model)
    with pytest.raises(InputError, match=r"layer '0'.*more than 1 value per channel"):
        forward_together(model, [x[:1]])
    assert unchanged(model, before)
    twin = copy.deepcopy(model)
    close([torch.cat(forward_together(model, x.split(1)))], [twin(x)], 1e-14)


@pytest.mark.filterwarnings("error")
def test_nothing_changes_nothing():
    model = nn.Sequential(BatchNorm(3))
    before = buffers(model)
    (y,) = forward_together(model, [torch.empty(0, 3)])
    assert y.shape == (0, 3)
    assert unchanged(model, before)


def test_bad_input_names_the_layer():
    model = nn.Sequential(BatchNorm(3))
    with pytest.raises(InputError, match=r"layer '0'.*3 channels"):
        forward_together(model, [torch.randn(4, 3), torch.randn(4, 2)])
    with pytest.raises(InputError, match="weights that are finite and not negative"):
        forward_together(
            model, [torch.randn(4, 3)] * 2, step=lambda net, x: net[0](x, -torch.ones(4))
        )


def test_nan_is_refused_by_its_channel_with_a_warning():
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    x = torch.randn(12, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin(x)
    x[8, 1] = torch.nan
    with pytest.warns(NonFiniteWarning, match=r"layer '0', BatchNorm\(3\).*1 of 3 channels \(1\)"):
        forward_together(model, x.split(SPLIT))
    expected = torch.where(torch.tensor([True, False, True]), twin[0].running_mean, 0.0)
    close([model[0].running_mean], [expected], 1e-14)
    assert model[0].running_var[1] == 1


def test_within_an_accumulation_all_goes_to_it():
    """One update by this large batch and what else came."""
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    x = torch.randn(20, 3, dtype=torch.float64) + torch.arange(20)[:, None]
    twin = copy.deepcopy(model)
    with accumulate_statistics(model):
        forward_together(model, x[:12].split(SPLIT))
        model(x[12:])
        assert model[0].num_batches_tracked == 0
    twin(x)
    close(model.buffers(), twin.buffers(), 1e-12)


def test_within_a_bank():
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    fake = bank(model, "fake", affine=True)
    with torch.no_grad():
        model[0].banks.fake.weight.fill_(3)
    twin, x = copy.deepcopy(model), torch.randn(12, 3, dtype=torch.float64)
    with fake:
        y = torch.cat(forward_together(model, x.split(SPLIT)))
    with bank(twin, "fake", affine=True):
        close([y], [twin(x)], 1e-12)
    close(model.buffers(), twin.buffers(), 1e-12)
    assert [int(k.num_batches_tracked) for k in (model[0], model[0].banks.fake)] == [0, 1]


@pytest.mark.parametrize("tool", [pause_statistics, accumulate_statistics, "bank"])
def test_switches_within_a_step_are_refused(tool):
    """Micro-batches take turns: one would switch for all, and in no order of its own."""
    model = nn.Sequential(BatchNorm(3))
    fake = bank(model, "fake")

    def step(net, part):
        with fake if tool == "bank" else tool(net):
            return net(part)

    before, state = buffers(model), switches(model)
    with pytest.raises(InputError, match=r"layer '0'.*around forward_together"):
        forward_together(model, torch.randn(12, 3).split(SPLIT), step=step)
    assert unchanged(model, before)
    assert switches(model) == state


def test_one_within_another_is_refused():
    model = nn.Sequential(BatchNorm(3))
    with pytest.raises(ArgumentError, match="one forward_together at a time"):
        forward_together(
            model, [torch.randn(4, 3)] * 2, step=lambda net, x: forward_together(net, [x])
        )


def test_a_copy_made_within_is_on_its_own():
    """Whose threads, locks and micro-batches are no part of the model."""
    model, copies = nn.Sequential(BatchNorm(3)), []

    def step(net, part):
        copies.append(copy.deepcopy(net))
        return net(part)

    forward_together(model, torch.randn(12, 3).split(SPLIT), step=step)
    copies[0](torch.randn(6, 3))
    assert copies[0][0].num_batches_tracked == 1


@pytest.mark.parametrize("offload", [False, True])
def test_graph_is_freed(offload):
    """A layer with renorm remembers forward passes for checkpointing: not these, and no graph."""
    model = nn.Sequential(BatchNorm(3, renorm=FULL))
    x = torch.randn(12, 3, requires_grad=True)
    outputs = forward_together(model, (x * 2).split(SPLIT), offload=offload)
    nodes, ahead = set(), [y.grad_fn for y in outputs]
    while ahead:
        node = ahead.pop()
        nodes.add(node)
        ahead += [other for other, _ in node.next_functions if other not in {None, *nodes}]
    ours = [weakref.ref(node) for node in nodes if "Moments" in node.name()]
    assert len(ours) == 3
    del outputs, nodes, node
    gc.collect()
    assert [reference() for reference in ours] == [None] * 3
