"""torch.compile: the layer as one graph, with the kernels' operators in it.

On a GPU, or in Triton's interpreter, whose operators the compiler does not look into; what it sees
when it does, `test_graphs.py` has.
"""

import pytest
import torch

import oracle
from batchnorm import BatchNorm, batch_norm_pure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Of values near 1, after some ten roundings of float32.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


class Graphs:
    """A backend that keeps what the compiler makes of a function, and runs it."""

    def __init__(self):
        self.nodes = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def keep(made, _):
            self.nodes.append([str(node.target) for node in made.graph.nodes])
            return torch._dynamo.utils.make_boxed_func(made.forward) if False else made.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)
