"""torch.compile: a layer as one graph with the kernels' operators in it.

On a GPU, or in Triton's interpreter, where the compiler does not look into the operators; what it
sees where it does is in test_graphs.py.
"""

import copy

import numpy as np
import pytest
import torch

import oracle
from batchnorm import BatchNorm, Renorm, batch_norm_pure
from batchnorm.kernels import calls, triton

DEVICE = "cpu" if triton.INTERPRETED else "cuda"

#: Values and gradients near 1, after some ten roundings of float32.
CLOSE = {"rtol": 4e-6, "atol": 4e-6}

# Dynamo makes an instance of Function whenever it meets an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")


if (reason := triton.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def fresh_compiler(without_native):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def operators():
    from batchnorm.kernels.triton import operators

    return operators


@pytest.fixture
def graphs():
    """A backend that runs what the compiler makes, and keeps the names of all operations."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    class Graphs(list):
        def keep(self, made, inputs):
            self.append(" ".join(str(node.target) for node in made.graph.nodes))
            return make_boxed_func(made.forward)

        def __call__(self, made, inputs):
            return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(made, inputs)

    return Graphs()


def layer_of(**options):
    """A layer whose parameters and statistics are not the initial ones."""
    layer = BatchNorm(5, device=DEVICE, **options)
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer


def normal(*shape):
    return (2 * torch.randn(shape) + 1).to(DEVICE)


def check(layer, forward, x, mask=None, residual=None, *, activation=None):
    """One step against the oracle."""
    layer.zero_grad()
    given = None if layer.training else (layer.running_mean.cpu(), layer.running_var.cpu())
    old = layer.running_mean.cpu().clone(), layer.running_var.cpu().clone()
    x.requires_grad_()
    residual = None if residual is None else residual.requires_grad_()
    y = forward(x, mask, residual)
    dy = torch.randn(y.shape).to(DEVICE)
    y.backward(dy)
    parameters = [None if p is None else p.detach().cpu() for p in (layer.weight, layer.bias)]
    options = {
        "mask": None if mask is None else mask.cpu(),
        "residual": None if residual is None else residual.detach().cpu(),
        "activation": activation,
        "channel_dim": layer.channel_dim,
        "given": given,
    }
    want = oracle.forward(x.detach().cpu(), *parameters, **options)
    gradients = oracle.backward(dy.cpu(), x.detach().cpu(), *parameters, **options)
    found = [y, x.grad, *(None if p is None else p.grad for p in (layer.weight, layer.bias))]
    found.append(None if residual is None else residual.grad)
    wanted = [want.y, *gradients]
    if layer.training:
        found += [layer.running_mean, layer.running_var]
        wanted += oracle.running(*old, want, layer.momentum)
    for a, b in zip(found, wanted, strict=True):
        if a is not None:
            want = torch.from_numpy(np.asarray(b, dtype=np.float64))
            torch.testing.assert_close(a.detach().cpu().double(), want, **CLOSE)


CASES = {
    "plain": {},
    "not affine": {"affine": False},
    "relu": {"activation": "relu"},
    "residual": {"activation": "leaky_relu"},
    "mask": {"activation": "relu"},
    "channels last": {"channel_dim": -1},
    "gaps": {},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_is_right_for_every_batch(graphs, name, training):
    layer = layer_of(**CASES[name]).train(training)
    forward = torch.compile(layer, fullgraph=True, backend=graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            x = normal(4, 6, 5) if name == "channels last" else normal(4, 5, 6)
            if name == "gaps":
                x = torch.stack([x, x], -1)[..., 0]
            mask = (torch.rand(4, 6) > 0.4).to(DEVICE) if name == "mask" else None
            residual = normal(4, 5, 6) if name == "residual" else None
            activation = CASES[name].get("activation")
            check(layer, forward, x, mask, residual, activation=activation)
    forward_graph, backward_graph = graphs
    node = "batchnorm_triton" if triton.INTERPRETED else "triton_kernel_wrapper"
    assert node in forward_graph
    assert node in backward_graph


def test_one_graph_serves_every_size(graphs):
    layer = layer_of(activation="relu")
    forward = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((4, 5, 6, 3), (7, 5, 4, 9), (2, 5, 40, 3)):
            check(layer, forward, normal(*shape), activation="relu")
    assert "batchnorm_triton.forward.default" in graphs[0]


@pytest.mark.slow
def test_inductor(graphs):
    layer = layer_of(activation="relu")
    forward = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        check(layer, forward, normal(4, 5, 6, 3), activation="relu")


def test_transforms_do_without(graphs):
    """What takes operations apart cannot take these."""

    def step(x):
        return batch_norm_pure(x, None, None, training=True, activation="relu").output

    x, dy = normal(3, 8, 5), normal(8, 5)
    loss = torch.func.vmap(torch.func.grad(lambda x: (step(x) * dy).sum()))
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(x), loss(x), **CLOSE)
    assert not any("triton" in graph for graph in graphs)


@pytest.mark.parametrize("option", ["virtual_batch_size", "renorm"])
def test_training_by_groups_and_renormalised_does_without_and_evaluation_does_not(graphs, option):
    """As `backends()` says."""
    layer = layer_of(**{option: 2 if option == "virtual_batch_size" else Renorm(3.0, 5.0)})
    forward = torch.compile(layer, fullgraph=True, backend=graphs)
    x = normal(4, 5, 6)
    forward(x)
    assert graphs
    assert not any("triton" in graph for graph in graphs)
    layer.eval()
    forward(x)
    assert "triton" in graphs[-1]


def test_exported_graphs_do_without():
    program = torch.export.export(layer_of().eval(), (normal(4, 5, 6),))
    assert not any("triton" in str(node.target) for node in program.graph.nodes)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_operators_are_what_they_say(operators, training, layout):
    """Shapes, strides and dtypes that the compiler is told, nothing changed, nothing shared."""
    x = LAYOUTS[layout](normal(4, 5, 6, 3).half())
    vectors = [torch.rand(5).to(DEVICE) for _ in range(4)]
    mask = (torch.rand(4, 1, 6, 3) > 0.4).to(DEVICE)
    given = (None, None) if training else vectors[2:]
    tests = ("test_schema", "test_faketensor")
    for more in ((None, None), (normal(4, 5, 6, 3), mask)):
        call = (x, *vectors[:2], *more, *given, 1e-5, 1, 1)
        torch.library.opcheck(operators.forward, call, test_utils=tests)
    y, statistics, count = operators.forward(*call)
    for wanted in (calls.WANT_X, calls.WANT_PARAMETERS, calls.WANT_X | calls.WANT_RESIDUAL):
        flags = 1 | wanted | (calls.TRAINING if training else 0)
        call = (torch.randn_like(y), x, y, statistics, vectors[0], mask, count, 1e-5, 1, flags)
        torch.library.opcheck(operators.backward, call, test_utils=tests)


def test_what_is_not_finite_stays_in_its_channel():
    layer = layer_of()
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(8, 5, 3)
    clean = copy.deepcopy(layer)
    clean(x)
    x[2, 1, 0] = torch.nan
    old = layer.running_var[1].item()
    forward(x)
    assert layer.running_var[1].item() == old
    sound = [0, 2, 3, 4]
    torch.testing.assert_close(layer.running_var[sound], clean.running_var[sound], **CLOSE)
