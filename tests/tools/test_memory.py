"""Graphs that keep one of a layer's two tensors: same gradients, fewer bytes, and nothing leaks."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    ArgumentError,
    BatchNorm,
    BatchNormLSTM,
    Renorm,
    accumulate_statistics,
    bank,
    forward_together,
    freeze,
    save_memory,
)
from batchnorm.bench.allocations import allocations
from batchnorm.tools import graph

pytestmark = pytest.mark.usefixtures("kernels")

BOTH = pytest.mark.parametrize("keep", ["input", "output"])


def wild(model):
    """γ and β of every kind: zero, tiny, negative; β far above γ."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, BatchNorm) and layer.weight is not None:
                layer.weight.copy_(torch.randn(layer.num_features))
                layer.weight[:3] = torch.tensor([0.0, 1e-30, -1e-6])
                if layer.bias is not None:
                    layer.bias.copy_(torch.randn(layer.num_features))
                    layer.bias[3] = 1e3
    return model


def convolutions(*after, channels=8, **options):
    layers = []
    for _ in range(3):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        layers += [BatchNorm(channels, **options), *copy.deepcopy(after)]
    return wild(nn.Sequential(*layers, nn.Conv2d(channels, 2, 1)))


def step(model, x, keep=None, dy=None, **forward):
    """Output, gradients and buffers of a training step by a copy; and what was saved."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with save_memory(model, keep) if keep else contextlib.nullcontext() as saved:
        y = model(x, **forward)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [y.detach(), *gradients, *(b.clone() for b in model.buffers())], saved


def same(a, b):
    # Of any bits, NaN too.
    return all(
        p.dtype == q.dtype
        and torch.equal(
            p.contiguous().view(-1).view(torch.uint8), q.contiguous().view(-1).view(torch.uint8)
        )
        for p, q in zip(a, b, strict=True)
    )


FUSED = {
    "none": convolutions,
    "relu": lambda: convolutions(activation="relu"),
    "leaky": lambda: convolutions(activation="leaky_relu"),
    "no affine": lambda: convolutions(affine=False),
    "no beta": lambda: convolutions(bias=False, activation="relu"),
    "ghost": lambda: convolutions(activation="relu", virtual_batch_size=2),
    "ragged ghost": lambda: convolutions(virtual_batch_size=4),
    "untracked": lambda: convolutions(track_running_stats=False),
    "evaluation": lambda: convolutions(activation="relu").eval(),
    "frozen": lambda: freeze(convolutions(activation="relu"), affine=False),
}
AFTER = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.2),
    "LeakyReLU in place": nn.LeakyReLU(0.2, inplace=True),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "ReLU6": nn.ReLU6(),
    "ReLU6 in place": nn.ReLU6(inplace=True),
    "Hardswish": nn.Hardswish(),
    "Hardtanh": nn.Hardtanh(-0.5, 2.0),
}
#: Bytes of a layer's output below.
SIZE = 6 * 8 * 9 * 7 * 4


@pytest.mark.parametrize("name", FUSED)
def test_the_output_again_is_the_same_bits(name):
    model = FUSED[name]()
    model = model if isinstance(model, nn.Module) else None
    if model is None:  # freeze changes in place
        model = convolutions(activation="relu")
        freeze(model, affine=False)
    x = torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    if "ghost" in name and saved.bytes == 0:
        # Groups that plain torch operations cut and join.
        assert all("a function after" in reason for reason in saved.reasons.values())
    else:
        assert saved.layers == {"1": SIZE, "3": SIZE, "5": SIZE}
        assert saved.reasons == {}


def kept_by(activation):
    """What torch's node of an activation keeps."""
    y = activation(torch.randn(2, requires_grad=True) * 1)
    return [name.removeprefix("_saved_") for name in dir(y.grad_fn) if name.startswith("_saved_")]


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_an_activation_that_follows_is_made_again_too(after):
    model, x = convolutions(after), torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    # ReLU keeps its result, the others what comes in, which is one more.
    kept = 1 if "result" in kept_by(after) else 2
    assert saved.layers == {"1": kept * SIZE, "4": kept * SIZE, "7": kept * SIZE}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_and_layouts(dtype, channels_last):
    model = convolutions(activation="relu").to(dtype)
    x = torch.randn(6, 8, 9, 7, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == 3 * SIZE // 4 * dtype.itemsize


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), 1e15])
@BOTH
def test_hostile_values(keep, hostile):
    model, x = BatchNorm(8, activation="leaky_relu"), torch.randn(64, 8)
    model = nn.Sequential(model, nn.Linear(8, 3))
    x[3, 2] = hostile
    with pytest.warns() if hostile != 1e15 else contextlib.nullcontext():
        expected, _ = step(model, x)
    with pytest.warns() if hostile != 1e15 else contextlib.nullcontext():
        found, saved = step(model, x, keep)
    if keep == "input":
        assert same(found, expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert saved.bytes > 0


@BOTH
def test_a_mask(keep):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.linear = BatchNorm(4, activation="leaky_relu"), nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.linear(self.bn(x, mask))

    x, mask = torch.randn(16, 4), torch.arange(16) < 11
    x[11:] = float("nan")
    model = Masked()
    with torch.no_grad():
        y = model(x, mask)
    assert not y[:11].isnan().any()
    expected, _ = step(model, x, mask=mask)
    found, saved = step(model, x, keep, mask=mask)
    assert same(found, expected)
    assert saved.bytes == (x.nbytes if keep == "input" else 0)


def test_views_of_the_output():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm(6, activation="relu")
            self.linear, self.narrow = nn.Linear(6 * 20, 3), nn.Linear(20, 3)

        def forward(self, x):
            y = self.bn(x)
            part = self.narrow(y[:, 2:5]).sum(1)
            return self.linear(y.flatten(1)) + part * y.transpose(1, 2).square()[:, :3, 0]

    model, x = Views(), torch.randn(5, 6, 20)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.layers == {"bn": x.nbytes}


def test_made_once_for_all_who_ask(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.a, self.b = BatchNorm(4, activation="relu"), *(nn.Linear(4, 4),) * 2

        def forward(self, x):
            y = self.bn(x)
            return self.a(y) * self.b(y) + y * y

    made = []
    get = graph._Recipe.get

    def spy(recipe):
        before = recipe.made
        value = get(recipe)
        if before is None:
            made.append(weakref.ref(value))
        return value

    monkeypatch.setattr(graph._Recipe, "get", spy)
    model, x = Twice(), torch.randn(8, 4)
    expected, _ = step(model, x)
    found, _ = step(model, x, "input")
    assert same(found, expected)
    assert len(made) == 1
    assert made[0]() is None
    with save_memory(model):
        loss = model(x).square().sum()
    first = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    assert len(made) == 2
    assert made[1]() is None
    assert same(torch.autograd.grad(loss, model.parameters()), first)
    assert len(made) == 3


@pytest.mark.parametrize("change", ["before", "after"])
@BOTH
def test_an_output_that_is_changed_in_place(keep, change):
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x = torch.randn(8, 4, requires_grad=True)
    with save_memory(nn.Sequential(bn), keep) as saved:
        y = bn(x)
        if change == "before":
            y.mul_(2)
        z = linear(y)
        with torch.no_grad():
            if change == "after":
                y.mul_(3)
    if keep == "output" and change == "after":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        return
    assert saved.bytes == (0 if change == "before" else x.nbytes)
    dy = torch.randn(8, 3)
    found = torch.autograd.grad(z, (x, linear.weight), dy)
    plain = linear(bn(x) * 2 if change == "before" else bn(x))
    expected = torch.autograd.grad(plain, (x, linear.weight), dy)
    assert same(found, expected)


@pytest.mark.parametrize("activate", [torch.relu, torch.relu_, torch.nn.functional.silu])
def test_an_activation_of_what_was_changed_behind_autograd(activate):
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            y = bn(x)
            with torch.no_grad():
                y.clamp_(-1, 1)
            y = activate(y)
            z = linear(y)
        results.append(torch.autograd.grad(z, (x, linear.weight), dy))
    assert same(*results)
    assert saved.bytes == 0


def test_an_activation_of_a_part_in_place():
    bn, linear = BatchNorm(4), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            y = bn(x)
            y[:, :2].relu_()
            z = linear(y)
        results.append(torch.autograd.grad(z, (x, linear.weight), dy))
    assert same(*results)
    assert saved.bytes == 0


def test_a_copy_in_another_layout():
    bn = BatchNorm(4)
    x, dy = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)
    results = []
    for around in (contextlib.nullcontext(), save_memory(nn.Sequential(bn))):
        with around as saved:
            z = bn(x).clone(memory_format=torch.channels_last).sigmoid_().exp()
        results.append(torch.autograd.grad(z, x, dy))
    assert same(*results)
    assert saved.bytes == 0


class Blocks(nn.Module):
    """Residual blocks; the first has a layer on the way around, too."""

    def __init__(self, activation="relu", around="convolution", number=4):
        super().__init__()
        self.start, self.end = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(number))
        self.norms = nn.ModuleList(BatchNorm(8, activation=activation) for _ in range(number))
        self.way, self.down, self.around = nn.Conv2d(8, 8, 1), BatchNorm(8), around

    def forward(self, x):
        x = self.start(x)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            residual = self.down(self.way(x)) if i == 0 and self.around else x
            x = norm(convolution(x), residual=residual)
        return self.end(x)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
@pytest.mark.parametrize("around", [True, False])
def test_residuals(activation, around):
    model, x = wild(Blocks(activation, around)), torch.randn(6, 3, 9, 7)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    # Every other block's output is made again, of the one before it, which is kept; the first one,
    # of the layer's on the way around, which is made for that.
    assert [saved.layers[f"norms.{i}"] for i in range(4)] == [SIZE, 0, SIZE, 0]
    assert set(saved.reasons) >= {"norms.1", "norms.3"}
    assert "again itself" in saved.reasons["norms.1"]
    assert saved.layers["down"] == 0
    _, saved = step(model, x, "output")
    assert saved.layers["norms.0"] == 0
    assert "residual" in saved.reasons["norms.0"]


def test_residuals_by_the_allocator():
    model, x = Blocks(), torch.randn(16, 3, 16, 16)

    def forward():
        with save_memory(model) as saved:
            loss = model(x).square().mean()
        assert saved.bytes == 2 * 16 * 8 * 16 * 16 * 4
        return loss

    usual = allocations(lambda: model(x).square().mean())
    found = allocations(forward)
    size = 2 * 16 * 8 * 16 * 16 * 4
    assert usual.held - size <= found.held < usual.held - size + 5 * 8 * 64


def test_a_residual_of_another_dtype():
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.a, self.b = BatchNorm(4, activation="relu"), *(nn.Linear(4, 4),) * 2

        def forward(self, x):
            r = self.a(x)
            return r.square() + self.b(self.bn(r.bfloat16(), residual=r))

    model, x = Wider(), torch.randn(8, 4)
    expected, _ = step(model, x)
    found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == x.nbytes


def test_an_activation_within_another_block():
    bn, other, linear = nn.Sequential(BatchNorm(4)), nn.Sequential(BatchNorm(4)), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    expected = torch.autograd.grad(linear(bn(x).relu()), (x, linear.weight), dy)
    with save_memory(bn) as outer:
        y = bn(x)
        with save_memory(other) as inner:
            z = linear(y.relu())
    assert same(torch.autograd.grad(z, (x, linear.weight), dy), expected)
    assert (outer.bytes, inner.bytes) == (0, 0)


@BOTH
def test_layers_one_after_the_other(keep):
    model = nn.Sequential(BatchNorm(4), BatchNorm(4), BatchNorm(4), nn.Linear(4, 3))
    x = torch.randn(8, 4)
    expected, _ = step(model, x)
    found, saved = step(model, x, keep)
    # Every other tensor: none is made from what is made itself.
    if keep == "input":
        assert same(found, expected)
        assert saved.layers == {"0": x.nbytes, "1": 0, "2": x.nbytes}
        assert "again itself" in saved.reasons["1"]
    else:
        assert saved.layers == {"0": x.nbytes, "1": 0, "2": x.nbytes}
        assert "kept anyway" in saved.reasons["1"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_saved_and_then_changed_is_told_as_without():
    # torch asks this only of what no hooks have packed.
    model, x = nn.Sequential(BatchNorm(4)), torch.randn(8, 4, requires_grad=True)
    with save_memory(model):
        h = x * 1
        z = h.exp()
        y = model(z)
    with torch.no_grad():
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH
def test_an_optimizer_may_step_in_between(keep):
    # A copy of β is kept; γ, which the layer itself saves, may not change, as without.
    bn, linear = BatchNorm(4, activation="leaky_relu"), nn.Linear(4, 3)
    x, dy = torch.randn(8, 4, requires_grad=True), torch.randn(8, 3)
    expected = torch.autograd.grad(linear(bn(x)), (x, linear.weight), dy)
    with save_memory(nn.Sequential(bn), keep):
        z = linear(bn(x))
    bn.bias.data.add_(100.0)  # autograd does not see it
    found = torch.autograd.grad(z, (x, linear.weight), dy)
    if keep == "input":
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    else:
        torch.testing.assert_close(found[1], expected[1])


@BOTH
def test_second_derivatives(keep):
    model = nn.Sequential(
        nn.Linear(4, 6), BatchNorm(6, activation="leaky_relu"), nn.Linear(6, 6), BatchNorm(6),
        nn.SiLU(), nn.Linear(6, 1),
    ).double()  # fmt: skip
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    dy, results = torch.randn(9, 1, dtype=torch.float64), []
    leaves = [x, *(p for p in model.parameters() if p is not model[5].bias)]
    for around in (contextlib.nullcontext(), save_memory(model, keep)):
        with around as saved:
            y = model(x)
        (gradient,) = torch.autograd.grad(y, x, dy, create_graph=True)
        grads = torch.autograd.grad(gradient.square().sum(), leaves, materialize_grads=True)
        results.append(grads)
    assert saved.bytes > 0
    assert max(float(g.abs().max()) for g in results[0]) > 0.01
    if keep == "input":
        assert same(*results)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@BOTH
def test_bytes_by_the_allocator(keep):
    model = convolutions(activation="leaky_relu")
    with torch.no_grad():  # so that no input must be kept
        for layer in model:
            if isinstance(layer, BatchNorm):
                layer.reset_parameters()
    x, saved = torch.randn(16, 8, 32, 32), None

    def forward(keep=None):
        nonlocal saved
        if keep is None:
            return model(x).square().mean()
        with save_memory(model, keep) as saved:
            return model(x).square().mean()

    usual = allocations(forward)
    found = allocations(lambda: forward(keep))
    assert saved.bytes == 3 * x.nbytes
    # Besides, γ, β and what finds the channels: a few numbers a channel.
    assert usual.held - 3 * x.nbytes <= found.held < usual.held - 3 * x.nbytes + 3 * 8 * 64
    assert forward is not None
    whole = allocations(lambda: forward().backward())
    less = allocations(lambda: forward(keep).backward())
    assert less.peak <= whole.peak - x.nbytes


@BOTH
def test_nothing_outlives_the_graph(keep):
    model, x = convolutions(nn.LeakyReLU()), torch.randn(6, 8, 9, 7)
    gc.collect()
    gc.disable()
    try:
        held = []
        hook = model[0].register_forward_hook(lambda *call: held.append(weakref.ref(call[2])))
        with save_memory(model, keep) as saved:
            keeper = model[1]._watched.func.__self__
            loss = model(x).sum()
            loss.backward()
            assert saved.bytes > 0
            del loss
            assert held[0]() is None
            assert len(keeper.ties) == len(keeper.kept) == 0
            unused = model(x)
            assert len(keeper.ties) > 0
            del unused
            assert len(keeper.ties) == len(keeper.kept) == 0
        hook.remove()
        assert model[1]._watched is None
        alive = weakref.ref(keeper)
        del keeper
        assert alive() is None
    finally:
        gc.enable()


@BOTH
def test_what_saves_nothing_says_so_and_works_as_usual(keep):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.residual = BatchNorm(4, activation="leaky_relu")
            self.renorm = BatchNorm(4, renorm=Renorm(2.0, 1.0))
            self.function = BatchNorm(4, activation=torch.tanh)
            self.chained = BatchNorm(4)
            self.last = BatchNorm(4)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(self.residual(x, residual=x + 1))
            y = self.linear(self.renorm(y))
            y = self.linear(self.function(y))
            return self.last(self.chained(self.linear(y))) + 1

    model, x = Block(), torch.randn(8, 4)
    for _ in range(3):
        model(torch.randn(8, 4))
    expected, _ = step(model, x)
    found, saved = step(model, x, keep)
    if keep == "input":
        assert same(found, expected)
    reasons = saved.reasons
    assert "residual" in reasons["residual"]
    assert "renorm" in reasons["renorm"]
    assert "function" in reasons["function"]
    assert saved.layers["chained"] == x.nbytes
    assert "last" in reasons
    assert saved.bytes == x.nbytes
    assert f"last: 0 ({reasons['last']})" in str(saved)
    assert str(saved).startswith("128 bytes not kept")


def test_checkpointing_goes_first():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    expected, _ = step(model, x)
    for reentrant in (False, True):
        twin, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        with save_memory(twin) as saved:
            y = checkpoint(twin, leaf, use_reentrant=reentrant)
        torch.manual_seed(7)
        y.backward(torch.randn(y.shape))
        found = [y.detach(), leaf.grad, *(p.grad for p in twin.parameters()), *twin.buffers()]
        assert same(found, expected)
        assert saved.bytes == 0
        if not reentrant:
            assert "checkpointing" in saved.reasons["1"]


def test_within_a_checkpoint():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)

    def part(x):
        with save_memory(model):
            return model(x)

    expected, _ = step(model, x)
    leaf = x.clone().requires_grad_()
    y = checkpoint(part, leaf, use_reentrant=False)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape))
    parameters = [p.grad for p in model.parameters()]
    assert same([y.detach(), leaf.grad, *parameters, *model.buffers()], expected)


def test_autocast():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = step(model, x)
        found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.layers == {"1": SIZE // 2, "3": SIZE // 2, "5": SIZE // 2}


@pytest.mark.slow
# Dynamo makes an instance of Function whenever it meets an autograd function.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
def test_compiled_code_goes_by_its_own_plan():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    compiled = torch.compile(model, backend="aot_eager")
    leaves = list(model.parameters())
    torch.manual_seed(0)
    dy = torch.randn(6, 2, 9, 7)
    expected = torch.autograd.grad(compiled(x), leaves, dy)
    with save_memory(model) as saved:
        y = compiled(x)
    assert same(torch.autograd.grad(y, leaves, dy), expected)
    assert saved.bytes == 0


def test_banks_and_blocks_around():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    other = bank(model, "other", affine=True)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, BatchNorm):
                layer.banks["other"].bias.add_(1.0)
    with other:
        expected, _ = step(model, x)
        found, saved = step(model, x, "input")
    assert same(found, expected)
    assert saved.bytes == 3 * SIZE
    before = [buffer.clone() for buffer in model.buffers()]
    with accumulate_statistics(model), save_memory(model):
        for micro in x.split(2):
            model(micro).square().sum().backward()
    assert [int(model[i].num_batches_tracked) for i in (1, 3, 5)] == [1, 1, 1]
    with save_memory(model) as outer:
        with save_memory(model) as inner:
            model(x)
        assert (outer.bytes, inner.bytes) == (0, 3 * SIZE)
        model(x)
        assert outer.bytes == 3 * SIZE
    assert len(before) == len(list(model.buffers()))


@BOTH
def test_an_input_that_another_operation_wants_is_kept(keep):
    class Shared(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first, self.bn = first, BatchNorm(4)
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            h = self.a(x)
            if self.first:
                return self.c(h) + self.b(self.bn(h))
            return self.b(self.bn(h)) + self.c(h)

    for first in (True, False):
        model, x = Shared(first), torch.randn(8, 4)
        expected, _ = step(model, x)
        found, saved = step(model, x, keep)
        assert same(found, expected)
        assert saved.bytes == (x.nbytes if keep == "input" else 0)


def test_passes_together_save_nothing_and_say_so():
    model, x = convolutions(activation="relu"), torch.randn(6, 8, 9, 7)
    results = []
    for around in (contextlib.nullcontext(), save_memory(model)):
        with around as saved:
            losses = forward_together(model, x.split(2), step=lambda m, b: m(b).square().sum())
        results.append(torch.autograd.grad(sum(losses), list(model.parameters())))
    assert same(*results)
    assert saved.reasons == dict.fromkeys("135", graph.UNSEEN)


def test_a_recurrent_network_saves_nothing_and_says_so():
    model, x = BatchNormLSTM(4, 6, max_length=5), torch.randn(5, 8, 4)
    with save_memory(model) as saved:
        y, _ = model(x)
    dy = torch.randn(5, 8, 6)
    found = torch.autograd.grad(y, list(model.parameters()), dy)
    expected = torch.autograd.grad(model(x)[0], list(model.parameters()), dy)
    assert saved.bytes == 0
    assert saved.reasons.keys() == saved.layers.keys()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_not_asked_for():
    model = convolutions()
    with torch.no_grad(), save_memory(model) as saved:
        model(torch.randn(6, 8, 9, 7))
    assert saved.bytes == 0
    assert saved.reasons == dict.fromkeys("135", graph.UNSEEN)


def test_refusals():
    with pytest.raises(ArgumentError, match='"input" or "output", got \'both\''):
        save_memory(convolutions(), "both").__enter__()
    mixed = nn.Sequential(BatchNorm(3), nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match="convert"):
        save_memory(mixed).__enter__()
    assert mixed[0]._watched is None
    with pytest.raises(ZeroDivisionError), save_memory(nn.Sequential(mixed[0])):
        raise ZeroDivisionError
    assert mixed[0]._watched is None
