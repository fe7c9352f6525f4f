"""Bad input is refused in words, by the function and by the layer, and changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from batchnorm import ArgumentError, BatchNorm, BatchNormError, InputError, batch_norm

x = torch.randn(4, 3, 5)


def long(*shape):
    return torch.zeros(shape, dtype=torch.long)


def packed(*lengths):
    return pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of num_features and features"),
        ({"num_features": 3, "features": 3}, "exactly one of num_features and features"),
        ({"num_features": 0}, "positive number of channels, got 0"),
        ({"num_features": -2}, "positive number of channels, got -2"),
        ({"num_features": 2.0}, "positive number of channels, got 2.0"),
        ({"features": True}, "positive number of channels, got True"),
        ({"features": "10"}, "positive number of channels, got '10'"),
        (
            {"features": 3, "eps": 0},
            "eps > 0 and finite, got 0: .*divided by 0; the usual value is 1e-5",
        ),
        ({"features": 3, "eps": -1e-5}, "eps > 0 and finite, got -1e-05"),
        ({"features": 3, "eps": float("inf")}, "eps > 0 and finite, got inf"),
        ({"features": 3, "eps": "1e-5"}, "eps > 0 and finite, got '1e-5'"),
        ({"features": 3, "momentum": "0.1"}, r"momentum in \[0, 1\].*got '0.1'"),
        ({"features": 3, "eps": float("nan")}, "eps > 0 and finite, got nan"),
        ({"features": 3, "momentum": -0.1}, r"momentum in \[0, 1\]"),
        ({"features": 3, "momentum": 1.1}, r"momentum in \[0, 1\].*Keras"),
        ({"features": 3, "momentum": float("nan")}, r"momentum in \[0, 1\]"),
        ({"features": 3, "activation": "swish"}, "'relu', 'leaky_relu' or a function.*'swish'"),
        ({"features": 3, "activation": 3}, "got 3"),
        ({"features": 3, "activation": torch.nn.ReLU}, r"class ReLU; pass ReLU\(\)"),
        ({"features": 3, "dtype": torch.long}, "floating dtype, got torch.int64"),
        ({"features": 3, "channel_dim": 1.0}, "channel_dim.*got 1.0"),
    ],
)
def test_constructor(arguments, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        BatchNorm(**arguments)
    assert isinstance(caught.value, BatchNormError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "edge", [{"momentum": 0.0}, {"momentum": 1.0}, {"momentum": 1}, {"eps": 1}]
)
def test_edges_of_what_is_allowed(edge):
    bn = BatchNorm(3, **edge)
    bn(x)
    momentum = edge.get("momentum", 0.1)
    torch.testing.assert_close(bn.running_mean, momentum * x.mean((0, 2)))


CALLS = [
    (
        (torch.randn(4, 2, 5),),
        r"3 channels \(the length of running_mean\) on axis 1 of x, got 2: .*\(4, 2, 5\)$",
    ),
    (
        (torch.randn(4, 5, 3),),
        r"expected 3 channels .*on axis 1.*got 5.*; axis 2 has 3: channel_dim=2\?",
    ),
    ((torch.tensor(1.0),), r"rank 2 or more.*got shape \(\)"),
    ((torch.randn(3),), r"rank 2 or more.*got shape \(3,\).*unsqueeze"),
    ((long(4, 3, 5),), "floating dtype, got torch.int64"),
    ((x.to(torch.complex64),), "floating dtype, got torch.complex64"),
    ((torch.randn(1, 3),), r"more than 1 value per channel.*\(1, 3\).*eval\(\)"),
    ((torch.randn(1, 3, 1, 1),), "more than 1 value per channel"),
    ((x, torch.ones(4, 3)), r"broadcasts to \(4, 5\).*got \(4, 3\)"),
    ((x, torch.ones(4, 3, 5)), r"broadcasts to \(4, 5\)"),
    ((x, torch.ones(4, 1, 5)), r"broadcasts to \(4, 5\).*drop the channel axis: mask.squeeze"),
    ((x, [[True] * 5] * 4), "mask to be a tensor, got list; torch.as_tensor"),
    ((x.numpy(),), "x to be a tensor, got ndarray"),
    ((x, None, 1.0), "residual to be a tensor, got float"),
    ((x.to_sparse(),), "dense tensor, got torch.sparse_coo; pad it"),
    ((x, torch.full((4, 5), 1.00001 / 20)), "at least 2 .*total weight of 1.*normalised"),
    ((x, torch.full((4, 5), 1.9 / 20)), "at least 2 .*total weight of 1.9"),
    ((x, torch.ones(4, 5, dtype=torch.complex64)), "booleans or real weights"),
    ((x, torch.full((4, 5), -0.5)), "not negative.*-0.5"),
    ((x, torch.full((4, 5), torch.nan)), "finite"),
    ((x, torch.full((4, 5), torch.inf)), "finite"),
    ((x, torch.zeros(4, 5, dtype=torch.bool)), "total weight of 0.*the other way round"),
    ((x, torch.zeros(4, 5)), "total weight of 0.*normalised"),
    ((x, torch.arange(20).reshape(4, 5) == 7), "total weight of 1"),
    ((x, torch.full((4, 5), 0.04)), "total weight of 0.8.*frequencies"),
    ((x, torch.ones(4, 5, requires_grad=True)), r"needs no gradient.*mask\.detach\(\)"),
    ((x, None, torch.randn(4, 3)), r"residual of the shape of x.*\(4, 3\)"),
    ((x, None, long(4, 3, 5)), "floating residual"),
    ((x, None, pack_sequence([x[0].T])), "a PackedSequence"),
    ((pack_sequence([x[0].T]), torch.ones(5)), "no mask with a PackedSequence"),
    ((pack_sequence([x[0].T]), None, x), "residual packed like x"),
    ((packed(3, 5), None, packed(5, 3)), "packed like x: the same lengths in the same order"),
    ((pack_sequence([x[0].T]), None, pack_sequence([x[0].T[:2]])), "residual packed like x"),
]


@pytest.mark.parametrize(("call", "words"), CALLS)
def test_layer_names_itself_and_changes_nothing(call, words):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList([nn.Identity(), BatchNorm(3)])

        def forward(self, *arguments):
            return self.body[1](*arguments)

    net = Net()
    net(torch.randn(8, 3))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=words) as caught:
        net(*call)
    assert "layer 'body.1', BatchNorm(3)" in str(caught.value)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_layer_outside_a_model_says_its_class():
    with pytest.raises(InputError, match=r"^BatchNorm\(3\): expected more than 1 value"):
        BatchNorm(3)(torch.randn(1, 3))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"running_mean": torch.zeros(2)},
            "2 channels .the length of running_mean. on axis 1 of x, got 3",
        ),
        ({"running_var": torch.zeros(3, 1)}, r"running_var.*\(3, 1\)"),
        (
            {"weight": torch.ones(4)},
            "4 channels .the length of weight. .* axis 0 has 4: channel_dim=0",
        ),
        ({"bias": torch.ones(1)}, "1 channels .the length of bias."),
        ({"running_mean": None}, "both, or neither"),
        ({"running_mean": None, "running_var": None, "training": False}, "nothing to normalise"),
        ({"channel_dim": 3}, "channel axis 3"),
        ({"channel_dim": -4}, "channel axis -4"),
        ({"eps": 0.0}, "eps > 0"),
        ({"momentum": 2.0}, "momentum in"),
        ({"momentum": None}, "momentum to be a number, got None: only a layer counts"),
        ({"activation": "gelu"}, "'gelu'"),
    ],
)
def test_function(changed, words):
    arguments = {
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
    } | changed
    with pytest.raises(BatchNormError, match=words):
        batch_norm(x, **arguments)
    if changed.get("running_var", 1) is not None and "running_mean" not in changed:
        assert torch.equal(arguments["running_mean"], torch.zeros(3))


def test_evaluation_accepts_one_value_and_any_mask_values():
    bn = BatchNorm(3).eval()
    want = torch.randn(1, 3)
    torch.testing.assert_close(bn(want), want / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(bn(want, torch.zeros(1)), want / (1 + 1e-5) ** 0.5)


def test_evaluation_still_checks_the_shape_of_a_mask():
    with pytest.raises(InputError, match=r"broadcasts to \(4, 5\)"):
        BatchNorm(3).eval()(x, torch.ones(4, 3))


def test_without_running_statistics_evaluation_needs_a_batch_too():
    bn = BatchNorm(3, track_running_stats=False).eval()
    with pytest.raises(InputError, match="more than 1 value per channel"):
        bn(torch.randn(1, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_in_words():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
        with pytest.raises(InputError, match="a nested one; pad it and pass a mask, or pack it"):
            BatchNorm(3)(nested)


@pytest.mark.filterwarnings("ignore:Function should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_layers_say_it_too(fullgraph):
    torch._dynamo.reset()
    compiled = torch.compile(BatchNorm(3), fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match="more than 1 value per channel"):
        compiled(torch.randn(1, 3))
