"""torch.compile and torch.export give the numbers of eager mode: outputs, gradients, buffers."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu

from batchnorm import BatchNorm, Renorm, batch_norm_pure

# Dynamo makes an instance of Function whenever it meets an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "simple average": {"momentum": None},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "channels last": {"channel_dim": -1},
    "relu": {"activation": "relu"},
    "callable": {"activation": gelu},
    "mask": {},
    "weights": {"channel_dim": -1},
    "residual": {"activation": "relu"},
    "mask and residual": {"activation": "leaky_relu", "momentum": None},
    "bfloat16": {},
    "float64": {"dtype": torch.float64},
    "ghost": {"virtual_batch_size": 3, "momentum": None, "channel_dim": -1},
    "ghost, masked": {"virtual_batch_size": 3, "activation": "relu"},
    "renorm": {"renorm": Renorm(1.3, 0.5, r_steps=(0, 2), d_steps=(1, 2))},
    "renorm, ghost, residual": {
        "renorm": Renorm(1.3, 0.5, r_steps=(0, 2), d_steps=(1, 2)),
        "virtual_batch_size": 3,
        "activation": gelu,
    },
}

# Eager may use torch's kernels where compiled code uses the reference: both round γ·x̂ + β a few
# times to float32, |x̂| ≤ 4, so a few times 4·2⁻²⁴; the gradient's sums add as much. float64 has
# one kernel, but two orders of summation.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name):
    """A layer whose parameters and statistics are not the initial ones."""
    layer = BatchNorm(5, **CASES[name])
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return layer


def arguments(name, batch):
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(name, torch.float32)
    shape = (batch, 5, 3) if CASES[name].get("channel_dim", 1) == 1 else (batch, 3, 5)
    x = (2 * torch.randn(shape) + 1).to(dtype)
    # Half the elements of some samples, never all.
    valid = torch.arange(3) < torch.randint(1, 4, (batch, 1))
    if name == "ghost, masked":
        valid[3:6] = False  # a whole group
    mask = {
        "mask": valid,
        "ghost, masked": valid,
        "mask and residual": valid,
        "weights": valid * torch.rand(batch, 3),
    }
    residual = torch.randn(shape) if "residual" in name else None
    return x, mask.get(name), residual


def step(layer, forward, x, mask, residual, cotangent):
    """Everything that a forward and a backward pass leave behind, by name."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = forward(x, mask, residual)
    y.backward(cotangent)
    left = {"y": y, "x.grad": x.grad, **dict(layer.named_buffers())}
    left |= {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    if residual is not None:
        left["residual.grad"] = residual.grad
    return {name: tensor.detach().clone() for name, tensor in left.items()}


def assert_same(compiled, eager):
    assert compiled.keys() == eager.keys()
    for name, expected in eager.items():
        assert compiled[name].dtype == expected.dtype
        if expected.dtype is torch.bfloat16:
            # Rounded from numbers that differ by 1e-7: at most one unit in the last place, 2⁻⁷.
            rtol = atol = 2.0**-7
        else:
            rtol = atol = TOLERANCE.get(expected.dtype, 0.0)
        torch.testing.assert_close(compiled[name], expected, rtol=rtol, atol=atol)


def check(name, training, backend, batches=(8, 8, 8), dynamic=None):
    torch.manual_seed(0)
    layer = made(name).train(training)
    twin = copy.deepcopy(layer)
    forward = torch.compile(twin, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in batches:
        x, mask, residual = arguments(name, batch)
        cotangent = torch.randn_like(x)
        eager = step(layer, layer, x, mask, residual, cotangent)
        assert_same(step(twin, forward, x, mask, residual, cotangent), eager)
    if layer.num_batches_tracked is not None:
        assert twin.num_batches_tracked == (len(batches) if training else 0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "relu"])  # it is in "residual"
def test_compiled_steps_are_eager_steps(name, training):
    if not training and CASES[name].keys() & {"virtual_batch_size", "renorm"}:
        pytest.skip("evaluation has nothing of them")
    check(name, training, "aot_eager")


# "renorm": the step is read from the counter as the code runs, not when it was compiled.
@pytest.mark.parametrize("name", ["plain", "mask and residual", "ghost", "renorm"])
def test_one_graph_serves_every_batch_size(name):
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(name, True, "aot_eager", batches=(8, 5, 11), dynamic=True)


def test_compiled_code_keeps_nan_out_of_the_buffers():
    torch.manual_seed(0)
    layer = made("plain")
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, _, _ = arguments("plain", 8)
    clean = copy.deepcopy(layer)
    clean(x)
    x[2, 1, 0] = torch.nan
    old = layer.running_mean[1].item(), layer.running_var[1].item()
    forward(x)
    assert (layer.running_mean[1].item(), layer.running_var[1].item()) == old
    sound = torch.tensor([0, 2, 3, 4])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(layer, name)[sound], getattr(clean, name)[sound], rtol=2e-6, atol=2e-6
        )


def test_compiled_code_keeps_a_masked_out_batch_from_the_buffers():
    """Whether enough is left cannot be seen while compiled code runs; so no variance is taken."""
    layer = BatchNorm(3)
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask = torch.zeros(8)
    for kept in (0.0, 1.0, 1.5):  # the least is 2: a total just above 1 divides by its excess
        mask[2] = kept
        forward(torch.randn(8, 3) + 5, mask)
        assert torch.equal(layer.running_mean, torch.zeros(3))
        assert torch.equal(layer.running_var, torch.ones(3))


def test_compiled_transforms_of_a_renormalized_step():
    renorm = Renorm(1.3, 0.5)
    mean, var = torch.randn(4, 5), torch.rand(4, 5) + 0.5

    def step(x, mean, var):
        pure = batch_norm_pure(x, mean, var, training=True, renorm=renorm, virtual_batch_size=3)
        return pure.output, pure.running_mean

    x = torch.randn(4, 8, 5, 3)
    compiled = torch.compile(torch.func.vmap(step), fullgraph=True, backend="aot_eager")
    want = [torch.stack(f) for f in zip(*map(step, x, mean, var), strict=True)]
    torch.testing.assert_close(list(compiled(x, mean, var)), want, rtol=2e-6, atol=2e-6)
    over_samples = torch.func.vmap(step, in_dims=(0, None, None))
    compiled = torch.compile(over_samples, fullgraph=True, backend="aot_eager")
    want = [torch.stack(f) for f in zip(*(step(b, mean[0], var[0]) for b in x), strict=True)]
    torch.testing.assert_close(list(compiled(x, mean[0], var[0])), want, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated")
@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("plain", True),
        ("mask and residual", True),
        ("relu", False),
        ("ghost, masked", True),
        # Its backward pass must not compute r and d again: the running statistics have moved.
        ("renorm, ghost, residual", True),
    ],
)
def test_inductor_steps_are_eager_steps(name, training):
    check(name, training, "inductor")


def exported(layer, x, **keywords):
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    return torch.export.export(layer, (x,), keywords, dynamic_shapes=(batch,))


@pytest.mark.parametrize("name", ["plain", "not affine", "relu", "channels last"])
def test_exported_evaluation(name):
    torch.manual_seed(0)
    layer = made(name).eval()
    x, _, _ = arguments(name, 4)
    program = exported(layer, x)
    nodes = [str(node.target) for node in program.graph.nodes if "batch_norm" in str(node.target)]
    # One node, that exporters to other formats know; it has no form for channels elsewhere.
    assert nodes == ([] if name == "channels last" else ["aten.batch_norm.default"])
    for batch in (4, 9):
        x, _, _ = arguments(name, batch)
        expected = layer(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "simple average", "channels last", "relu", "renorm"])
def test_exported_training_program_updates_the_buffers(name):
    torch.manual_seed(0)
    layer = made(name)
    x, _, _ = arguments(name, 4)
    program = exported(copy.deepcopy(layer), x).module()
    for key, value in program.state_dict().items():
        torch.testing.assert_close(value, layer.state_dict()[key], rtol=0, atol=0)  # not a step
    for batch in (4, 9, 2):
        x, _, _ = arguments(name, batch)
        torch.testing.assert_close(program(x), layer(x), rtol=2e-6, atol=2e-6)
        for key, value in layer.named_buffers():
            torch.testing.assert_close(program.get_buffer(key), value, rtol=2e-6, atol=2e-6)
    assert program.get_buffer("num_batches_tracked") == 3
