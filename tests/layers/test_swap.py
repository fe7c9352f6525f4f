"""Putting BatchNorm where torch.nn.BatchNorm1d/2d/3d was changes nothing but what is said here."""

import copy
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing._internal.common_modules import module_db

from batchnorm import ArgumentError, BatchNorm

pytestmark = pytest.mark.usefixtures("kernels")

TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

OPTIONS = [
    {},
    {"eps": 0.1, "momentum": 0.7},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    *([{"bias": False}] if "bias" in signature(nn.BatchNorm2d).parameters else []),  # from 2.13 on
    {"track_running_stats": False},
]


# SiLU, not ReLU: a sign that two correct layers tell differently in the last bit of z would flip
# a whole gradient.
def mlp(**options):
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16, **options),
        nn.SiLU(),
        nn.Linear(16, 8, bias=False),
        nn.BatchNorm1d(8, **options),
        nn.SiLU(),
        nn.Linear(8, 3),
    )


def conv(dim, **options):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    norm = TORCH[dim - 1]
    return nn.Sequential(
        layer(2, 5, 3, padding=1, bias=False),
        norm(5, **options),
        nn.SiLU(),
        layer(5, 4, 2),
        norm(4, **options),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


MODELS = {
    "mlp": (mlp, (16, 6)),
    "conv1d": (lambda **options: conv(1, **options), (6, 2, 9)),
    "conv2d": (lambda **options: conv(2, **options), (4, 2, 6, 5)),
    "conv3d": (lambda **options: conv(3, **options), (3, 2, 4, 3, 4)),
}


def swapped(model):
    """A copy of the model with our layer for each of torch's."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, TORCH):
                setattr(parent, name, like(layer))
    return model


def like(layer):
    """Our layer with the options and the state of torch's."""
    ours = BatchNorm(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        dtype=next((p.dtype for p in layer.parameters()), None),
        bias=layer.bias is not None,
    )
    if layer.running_mean is not None:
        ours.to(layer.running_mean.dtype)
    ours.load_state_dict(layer.state_dict(), strict=True)
    return ours.train(layer.training)


def scrambled(layer):
    """The layer with parameters and statistics that are not the initial ones."""
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                tensor.fill_(3)
            else:
                tensor.uniform_(0.5, 2.0)
    return layer


def step(model, x, cotangent):
    """Everything that a forward and a backward pass leave behind, by name."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(cotangent)
    left = {"y": y, "x.grad": x.grad, **dict(model.named_buffers())}
    left |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in left.items()}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # The largest element is the scale: sums that are 0 but for rounding (a bias before a
        # batch normalization) have no relative precision of their own.
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        error = (ours[name] - expected).abs().max().item() if expected.numel() else 0.0
        assert ours[name].shape == expected.shape
        assert error <= tolerance * scale, f"{name} is {error:.2e} off, of {scale:.2e}"


# One pass of two layers rounds each value some 30 times (the sums of a convolution, of the
# statistics, of the backward pass) to u = eps/2, and 1/σ, up to 5 here, carries it on: about 150u.
# Ten steps of SGD with lr · gradient below 0.05 add little to that. Measured: at most 30u.
STEPS = 10
TOLERANCE = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation_are_torchs(name, options, dtype):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    theirs = build(**options)
    theirs(torch.randn(shape))  # materialises the lazy layer; and statistics that are not initial
    theirs = theirs.to(dtype)
    ours = swapped(theirs)
    assert sum(isinstance(layer, BatchNorm) for layer in ours.modules()) == 2
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for m in (ours, theirs)
    ]
    for training in [True] * STEPS + [False]:
        ours.train(training)
        theirs.train(training)
        x = 2 * torch.randn(shape, dtype=dtype) + 0.5
        cotangent = torch.randn(shape[0], 3, dtype=dtype) / shape[0]  # a mean loss
        assert_same(step(ours, x, cotangent), step(theirs, x, cotangent), TOLERANCE[dtype])
        for optimizer in optimizers:
            optimizer.step()
    tracked = options.get("track_running_stats", True)
    assert [int(b) for n, b in ours.named_buffers() if n.endswith("tracked")] == (
        [STEPS + 1] * 2 if tracked else []
    )


def torch_inputs():
    """torch's own constructor and forward inputs for its three classes."""
    for info in module_db:
        if info.module_cls not in TORCH:
            continue
        for dtype in info.dtypes:
            for training in (True, False):
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    inputs = info.module_inputs_func(
                        info, device="cpu", dtype=dtype, requires_grad=False, training=training
                    )
                for case in inputs:
                    mode = "train" if training else "eval"
                    label = f"{info.name}-{case.desc or 'plain'}-{dtype}-{mode}"
                    yield pytest.param(info.module_cls, case, dtype, training, id=label)


@pytest.mark.parametrize(("cls", "case", "dtype", "training"), list(torch_inputs()))
def test_torchs_own_test_inputs(cls, case, dtype, training):
    torch.manual_seed(0)
    args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
    theirs = scrambled(cls(*args, dtype=dtype, **kwargs)).train(training)
    ours = BatchNorm(*args, **{**kwargs, "dtype": dtype})
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.train(training)
    (x,) = case.forward_input.args
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    cotangent = torch.randn_like(x)
    left, expected = step(ours, x, cotangent), step(theirs, x, cotangent)
    if x.numel() == 0:
        # We differ on purpose: torch counts an empty batch as one more, we change nothing.
        expected |= before
    # One layer: some 10 roundings a value, times 1/σ ≤ 10 in the gradient; eps = 2u.
    assert_same(left, expected, 50 * torch.finfo(dtype).eps)


def torch_error_inputs():
    for info in module_db:
        if info.module_cls in TORCH:
            for training in (True, False):
                for case in info.module_error_inputs_func(
                    info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
                ):
                    kwargs = case.module_error_input.constructor_input.kwargs
                    mode = "train" if training else "eval"
                    yield pytest.param(case, training, id=f"{info.name}-{kwargs}-{mode}")


@pytest.mark.parametrize(("case", "training"), list(torch_error_inputs()))
def test_torchs_own_error_inputs(case, training):
    # We differ on purpose: torch finds a bad eps in the first forward pass, we in the constructor,
    # in words of our own; but the type that torch's users catch catches it.
    construct = case.module_error_input.constructor_input
    assert issubclass(ArgumentError, case.error_type)
    with pytest.raises(ArgumentError, match="expected eps > 0"):
        BatchNorm(*construct.args, **construct.kwargs)


@pytest.mark.parametrize("cls", TORCH)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dicts_load_both_ways(cls, options):
    torch.manual_seed(0)
    theirs, ours = scrambled(cls(4, **options)), scrambled(BatchNorm(4, **options))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((theirs, BatchNorm(4, **options)), (ours, cls(4, **options))):
        target.load_state_dict(source.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            torch.testing.assert_close(target.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("metadata", [True, False])
def test_checkpoint_from_before_num_batches_tracked(metadata):
    """Version 1 of torch's layer had no counter; some such files also lost their metadata."""
    torch.manual_seed(0)
    theirs = scrambled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    old = theirs.state_dict()
    del old["1.num_batches_tracked"]
    if metadata:
        old._metadata["1"]["version"] = 1
    else:
        old = dict(old)
    ours = nn.Sequential(nn.Linear(3, 4), BatchNorm(4))
    ours.load_state_dict(old, strict=True)
    x = torch.randn(5, 3)
    # |y| ≤ 8, and a handful of roundings, 2⁻²⁴ each.
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=5e-6)
    assert ours[1].num_batches_tracked == 0


def test_current_checkpoint_without_counter_is_still_refused():
    state = nn.BatchNorm1d(4).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        BatchNorm(4).load_state_dict(state, strict=True)


class OutlineBatchNorm(nn.Module):
    """The layer of the outline, as a reader has typed and trained it."""

    def __init__(self, features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.features = features
        self.eps = eps
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x):
        x = (x - self.running_mean) / torch.sqrt(self.running_var + self.eps)
        return self.gamma * x + self.beta


def test_gamma_and_beta_of_the_outline_load():
    torch.manual_seed(0)
    theirs = scrambled(nn.Sequential(nn.Linear(3, 4), OutlineBatchNorm(4)))
    state = theirs.state_dict()
    keys = list(state)
    ours = nn.Sequential(nn.Linear(3, 4), BatchNorm(features=4))
    ours.load_state_dict(state, strict=True)
    assert list(state) == keys  # the caller's dictionary is the caller's
    torch.testing.assert_close(ours[1].gamma, theirs[1].gamma, rtol=0, atol=0)
    torch.testing.assert_close(ours[1].beta, theirs[1].beta, rtol=0, atol=0)
    x = torch.randn(5, 3)
    # |y| ≤ 8, and a handful of roundings, 2⁻²⁴ each.
    torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=0, atol=5e-6)


def test_a_file_with_both_spellings_is_refused():
    state = BatchNorm(4).state_dict() | {"gamma": torch.full((4,), 9.0)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gamma"):
        BatchNorm(4).load_state_dict(state, strict=True)


def test_what_asks_for_torchs_base_class_finds_it():
    assert issubclass(BatchNorm, _BatchNorm)
    assert isinstance(BatchNorm(4), _BatchNorm)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1, "momentum": None}])
def test_convert_sync_batchnorm_takes_it_over(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), scrambled(BatchNorm(4, **options)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(sync[1]) is nn.SyncBatchNorm
    assert (sync[1].eps, sync[1].momentum) == (
        options.get("eps", 1e-5),
        options.get("momentum", 0.1),
    )
    assert state.keys() == sync.state_dict().keys()
    for name, value in sync.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_weight_decay_filter_by_class_finds_gamma_and_beta():
    """The loop of torchvision's and many others' training scripts."""
    first, last = BatchNorm(4), BatchNorm(4)
    linear = nn.Linear(3, 4)
    model = nn.Sequential(linear, first, nn.Sequential(nn.ReLU(), last))
    decay: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for layer in model.modules():
        group = free if isinstance(layer, _BatchNorm) else decay
        group += layer.parameters(recurse=False)
    assert [id(p) for p in decay] == [id(p) for p in linear.parameters()]
    assert [id(p) for p in free] == [id(p) for bn in (first, last) for p in (bn.gamma, bn.beta)]


def test_symbolic_trace_works_as_with_torchs_layer():
    model = nn.Sequential(nn.Linear(3, 4), scrambled(BatchNorm(4))).eval()
    x = torch.randn(5, 3)
    close = torch.testing.assert_close
    close(torch.fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)
