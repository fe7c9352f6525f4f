"""What the tests of fold share."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def randomized(model):
    """No number as a new model has it: mistakes show."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor))
                if name.endswith("running_var"):
                    tensor.exp_()
    return model


def count(model):
    """How many batch norm layers there are."""
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def assert_same(folded, model, *inputs, **keywords):
    """In float64: but for rounding, the same. 1e-12 is 10⁴ units, for sums of 10² terms."""
    training = model.training
    with torch.no_grad():
        expected, got = model.eval()(*inputs, **keywords), folded(*inputs, **keywords)
    model.train(training)
    assert expected.dtype is torch.float64
    most = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * most)


def reasons(folded):
    """Why each layer was left."""
    return {left.layer: left.reason for left in folded.fold_report.left}
