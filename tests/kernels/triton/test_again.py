"""An output that is made again, for `save_memory`, has the very same bits."""

import pytest
import torch

from batchnorm import BatchNorm
from batchnorm.autograd_memory import call_of, output_again
from triton_steps import CUTS, DEVICE, LAYOUTS, lay, normal, served


@pytest.mark.parametrize("cut", CUTS, indirect=True)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(33, 9), (5, 3, 11), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(cut, activation, shape, dtype):
    bn = BatchNorm(shape[1], activation=activation, device=DEVICE)
    with torch.no_grad():
        bn.weight.copy_(normal(shape[1]))
        bn.bias.copy_(normal(shape[1]))
    x = (normal(*shape) * 3 + 5).to(dtype)
    for layout in LAYOUTS[:2]:
        for residual in (None, normal(*shape, dtype=dtype)):
            for training in (True, False):
                leaf = lay(x, layout).detach().requires_grad_()
                y = bn.train(training)(leaf, residual=residual)
                assert served(y)
                assert y.grad_fn.backend == "triton"
                made = output_again(call_of(y, leaf, bn.bias))(leaf.detach(), residual)
                assert made.stride() == y.stride()
                bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
                assert torch.equal(made.view(bits), y.detach().view(bits))
