"""Exported to ONNX and run by ONNX Runtime, the layer is what evaluation is."""

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, convert, freeze

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow

C = 5


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = BatchNorm(C)

    def forward(self, x, mask):
        return self.bn(x, mask=mask)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bn = BatchNorm(C, activation="relu", **options)

    def forward(self, x, residual):
        return self.bn(x, residual=residual)


def layer(**options):
    return nn.Sequential(BatchNorm(C, **options))


def frozen():
    model = layer(activation="relu")
    freeze(model)
    return model


IMAGE = (2, C, 4, 3)
ONE = ["BatchNormalization"]
ARITHMETIC = ["Cast", "Sub", "Mul", "Mul", "Add", "Cast"]
#: What makes a model, the shapes of its inputs, and the graph's nodes.
CASES = {
    "dense": (layer, [(2, C)], ONE),
    "sequence": (layer, [(2, C, 4)], ONE),
    "image": (layer, [IMAGE], ONE),
    "volume": (layer, [(2, C, 4, 3, 2)], ONE),
    "no bias": (lambda: layer(bias=False), [IMAGE], ONE),
    "frozen": (frozen, [IMAGE], [*ONE, "Relu"]),
    "no affine": (lambda: layer(affine=False), [IMAGE], ONE),
    "options of training": (
        lambda: layer(virtual_batch_size=2, process_group="world"), [IMAGE], ONE
    ),
    "relu": (lambda: layer(activation="relu"), [IMAGE], [*ONE, "Relu"]),
    "leaky relu": (lambda: layer(activation="leaky_relu"), [IMAGE], [*ONE, "LeakyRelu"]),
    "a module": (lambda: layer(activation=nn.SiLU()), [IMAGE], [*ONE, "Sigmoid", "Mul"]),
    "residual": (Block, [IMAGE, IMAGE], [*ONE, "Add", "Relu"]),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, C, 3), BatchNorm(C, activation="relu")),
        [(2, 3, 6, 6)],
        ["Conv", "Relu"],
    ),
    "converted": (
        lambda: convert(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))), [(2, 3)], ["Gemm"]
    ),
    "channels last": (lambda: layer(channel_dim=-1), [(2, 4, 3, C)], ARITHMETIC),
    "residual, channels last": (
        lambda: Block(channel_dim=-1), [(2, 4, C)] * 2, [*ARITHMETIC, "Add", "Relu", "Cast"]
    ),
    "mask": (Masked, [(2, C, 4), (2, 4)], ARITHMETIC),
}  # fmt: skip


def exported(model, inputs):
    """The program with any number of samples, and a session that runs it."""
    samples = torch.export.Dim("samples")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=tuple({0: samples} for _ in inputs),
            verbose=False,
        )
    model = program.model_proto.SerializeToString()
    return program, onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def exported_by_tracing(model, inputs):
    """By the exporter that torch had first."""
    file, names = io.BytesIO(), [f"input{index}" for index in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.onnx.export(
            model,
            inputs,
            file,
            dynamo=False,
            opset_version=13,  # of 2020
            input_names=names,
            dynamic_axes={name: {0: "samples"} for name in names},
        )
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


def run(session, inputs):
    names = [given.name for given in session.get_inputs()]
    assert len(names) == len(inputs) or inputs[1].dtype is torch.bool  # tracing drops the mask
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=False)))[0]


def inputs_of(shapes, samples, masked=False):
    inputs = [torch.randn(samples, *shape[1:]) for shape in shapes]
    if masked:
        inputs[1] = inputs[1] > 0
    return tuple(inputs)


@pytest.mark.parametrize(("make", "shapes", "nodes"), CASES.values(), ids=CASES)
def test_is_evaluation(make, shapes, nodes):
    model = make().train(make is frozen)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    masked = make is Masked
    given = inputs_of(shapes, 2, masked)
    program, session = exported(model, given)
    assert [node.op_type for node in program.model.graph] == nodes
    for either in (session, exported_by_tracing(model.eval(), given)):
        for samples in (1, 7):
            inputs = inputs_of(shapes, samples, masked)
            expected = model(*inputs)
            assert expected.shape[0] == samples
            # A convolution of 27 products, and a dozen roundings to 2⁻²⁴ of numbers up to 10.
            torch.testing.assert_close(
                torch.from_numpy(run(either, inputs)), expected, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("export", [lambda *given: exported(*given)[1], exported_by_tracing])
def test_half_precision(export):
    model = layer(dtype=torch.float16).eval()
    for tensor in (*model.parameters(), model[0].running_mean, model[0].running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(IMAGE).half()
    got = torch.from_numpy(run(export(model, (x,)), (x,)))
    assert got.dtype is torch.float16
    # Computed in float32: one rounding to 2⁻¹¹ of numbers up to 10.
    torch.testing.assert_close(got, model(x), rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize(("channel_dim", "tolerance"), [(1, 2.0**-10), (-1, 2.0**-20)])
def test_far_from_zero(channel_dim, tolerance):
    """Against float64. As arithmetic it is as exact as the layer.

    ONNX Runtime folds the mean into a shift for its one node, x · scale + (β − mean · scale), which
    rounds numbers of the size of the mean, 2¹⁴, to 2⁻²⁴ of them: 2⁻¹⁰.
    """
    shape = [64, 4, 4]
    shape.insert(1 if channel_dim == 1 else 3, C)
    model = layer(channel_dim=channel_dim).eval()
    model[0].running_mean.fill_(1e4)
    x = 1e4 + torch.randn(shape)
    _, session = exported(model, (x,))
    expected = (x.double().numpy() - 1e4) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(run(session, (x,)), expected, rtol=0, atol=4 * tolerance)
    np.testing.assert_allclose(model(x).detach(), expected, rtol=0, atol=4 * 2.0**-20)
