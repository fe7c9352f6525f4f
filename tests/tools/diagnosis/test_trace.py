"""Where what comes into layers is from: functions and modules, views, changes in place."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from batchnorm import BatchNorm, diagnose, freeze
from batchnorm.tools.diagnosis.trace import Trace, WithoutBias


def traced(model, *inputs, layer=None):
    layers = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    trace = Trace(layers)
    with trace.hooks():
        model(*inputs)
    assert all(not x._forward_hooks and not x._forward_pre_hooks for x in layers)
    assert all(not x for x in (trace._made, trace._dropped, trace._outputs, trace._kept))
    return trace, trace.before.get(layers[0])


class Net(nn.Module):
    """A function before the layer, and one after."""

    def __init__(self, before, after=None, norm=None, **modules):
        super().__init__()
        self.before, self.after = before, after or (lambda self, y: y)
        self.norm = norm or nn.BatchNorm1d(4)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.after(self, self.norm(self.before(self, x)))


def linear(bias=True):
    return nn.Linear(6, 4, bias=bias)


WAYS = {
    "module": lambda self, x: self.f(x),
    "function": lambda self, x: functional.linear(x, self.f.weight, self.f.bias),
    "by name": lambda self, x: functional.linear(x, weight=self.f.weight, bias=self.f.bias),
    "viewed": lambda self, x: self.f(x[:, None]).transpose(1, 2).flatten(1),
    "identity": lambda self, x: nn.Identity()(self.f(x)),
    "dropout that drops nothing": lambda self, x: functional.dropout(self.f(x), 0.0),
    "input by name": lambda self, x: functional.linear(
        input=x, weight=self.f.weight, bias=self.f.bias
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
def test_a_linear_function_right_before(way, bias, norm):
    model = Net(WAYS[way], norm=norm(4), f=linear(bias))
    trace, origin = traced(model, torch.randn(5, 6))
    assert (origin.function, origin.dropout) == ("linear", 0)
    assert origin.bias is model.f.bias
    assert trace.dropouts == 0


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", ["", "Transpose"])
def test_convolutions(dimensions, transposed):
    make = getattr(nn, f"Conv{transposed}{dimensions}d")
    norm = getattr(nn, f"BatchNorm{dimensions}d")(4)
    model = nn.Sequential(make(2, 4, 3), norm)
    _, origin = traced(model, torch.randn(3, 2, *[5] * dimensions))
    name = f"conv{'_transpose' if transposed else ''}{dimensions}d"
    assert (origin.function, origin.bias is model[0].bias) == (name, True)


@pytest.mark.parametrize(
    "between",
    [
        lambda self, x: self.f(x).relu(),
        lambda self, x: self.f(x) + 1,
        lambda self, x: self.f(x).relu_(),
        lambda self, x: self.f(x).add_(1),
        lambda self, x: functional.relu(self.f(x), inplace=True),
        lambda self, x: x[:, :4],
    ],
)
def test_what_is_not_right_before(between):
    assert traced(Net(between, f=linear()), torch.randn(5, 6))[1] is None


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training):
    drop = nn.Dropout(0.3)
    for before, expected in (
        (lambda self, x: self.drop(self.f(x)), ("dropout", 0.3)),
        (lambda self, x: self.f(self.drop(x)), ("linear", 0.3)),
        (lambda self, x: functional.dropout(self.f(x), 0.2, self.training), ("dropout", 0.2)),
        (lambda self, x: functional.dropout(self.f(x), p=0.2), ("dropout", 0.2)),
        (lambda self, x: functional.dropout(self.f(x)), ("dropout", 0.5)),
        (lambda self, x: functional.alpha_dropout(self.f(x), 0.2), ("dropout", 0.2)),
    ):
        model = Net(before, f=linear(), drop=drop).train(training)
        trace, origin = traced(model, torch.randn(5, 6))
        assert (origin.function, origin.dropout) == expected
        assert trace.dropouts >= 1
        assert (origin.bias is model.f.bias) == (expected[0] == "linear")


AFTER = {
    "module": (lambda self, y: nn.ReLU()(y), True),
    "in place": (lambda self, y: nn.ReLU(inplace=True)(y), True),
    "method": (lambda self, y: y.relu(), True),
    "in-place method": (lambda self, y: y.relu_(), True),
    "relu6": (lambda self, y: nn.ReLU6()(y), True),
    "hardtanh that is none": (lambda self, y: nn.Hardtanh()(y), False),
    "viewed": (lambda self, y: y.view(-1).relu(), True),
    "sum": (lambda self, y: (y + 1).relu(), False),
    "sum in place": (lambda self, y: y.add_(1).relu(), False),  # torchvision's residual blocks
    "sum by operator": (lambda self, y: y.__iadd__(1).relu_(), False),
    "another function": (lambda self, y: y.tanh(), False),
}


@pytest.mark.parametrize("way", AFTER)
def test_whose_output_a_relu_takes(way):
    after, expected = AFTER[way]
    model = Net(lambda self, x: x[:, :4], after)
    trace, _ = traced(model.eval(), torch.randn(5, 6))
    assert (model.norm in trace.activated) == expected


def test_tensors_that_show_no_memory_do_no_harm():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.norm = linear(), nn.BatchNorm1d(4)

        def forward(self, adjacency, x):
            return self.norm(self.f(torch.sparse.mm(functional.dropout(adjacency, 0.0), x)))

    model = Graph()
    assert traced(model, torch.eye(5).to_sparse(), torch.randn(5, 6))[1].function == "linear"
    with torch.inference_mode():
        _, origin = traced(Net(WAYS["module"], f=linear()), torch.randn(5, 6))
    assert origin.function == "linear"


def test_a_failing_pass_leaves_nothing():
    model = Net(WAYS["module"], f=linear())
    trace = Trace([model.norm])
    with pytest.raises(RuntimeError), trace.hooks():
        model(torch.randn(5, 7))
    assert all(
        not x for x in (model.norm._forward_hooks, model.norm._forward_pre_hooks, trace._kept)
    )


@pytest.mark.parametrize("way", ["module", "function", "by name"])
def test_without_bias(way):
    model, x = Net(WAYS[way], f=linear()), torch.randn(5, 6)
    model.norm = nn.Identity()
    with WithoutBias([model.f.bias]):
        assert torch.equal(model(x), functional.linear(x, model.f.weight))
    with WithoutBias([torch.zeros(4)]):
        assert torch.equal(model(x), model.f(x))
    assert torch.equal(model(x), model.f(x))


# --- is the bias of use? -------------------------------------------------------------------------


class Skip(nn.Module):
    """The bias goes to the layer, and past it."""

    def __init__(self, past):
        super().__init__()
        self.past, self.f, self.g = past, linear(), nn.Linear(4, 4)
        self.one, self.two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.f(x)
        return self.past(self.two(self.g(self.one(x).relu())), x)


@pytest.mark.parametrize(
    ("past", "expected"),
    [
        (lambda y, x: y, ["one", "two"]),
        (lambda y, x: y + x, ["two"]),
        # To another normalization, which takes it off as well.
        (lambda y, x: y + functional.batch_norm(x, None, None, training=True), ["one", "two"]),
    ],
)
def test_a_bias_is_only_called_useless_if_the_output_does_without(past, expected):
    model = Skip(past)
    nn.init.normal_(model.f.bias)
    batches = [torch.randn(64, 6) for _ in range(3)]
    found = [f for f in diagnose(model, batches).findings if f.code == "BN202"]
    assert [finding.layer for finding in found] == expected
    assert all(finding.evidence["moved"] < 1e-5 for finding in found)
    # The remedy changes nothing.
    if expected == ["one", "two"]:
        before = model(batches[0])
        nn.init.zeros_(model.f.bias), nn.init.zeros_(model.g.bias)
        assert torch.allclose(model(batches[0]), before, atol=1e-5)


def test_a_bias_before_a_frozen_layer_is_of_use():
    model = Net(WAYS["module"], f=linear())
    batches = [torch.randn(64, 6) for _ in range(3)]
    assert "BN202" in [f.code for f in diagnose(model, batches).findings]
    model.norm.running_mean += 0.1
    freeze(model)
    assert "BN202" not in [f.code for f in diagnose(model, batches).findings]
