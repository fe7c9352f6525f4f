"""What torch.compile sees of the operators: the kernels themselves. No GPU is needed to look."""

import pytest
import torch

pytest.importorskip("triton")

from batchnorm import BatchNorm
from batchnorm.kernels import triton

if triton.INTERPRETED:
    pytest.skip("Triton's interpreter is on: the compiler sees no kernels", allow_module_level=True)

from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from machine_code import absent

pytestmark = [
    # Dynamo makes an instance of Function whenever it meets an autograd function.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated"),
    # The compiler compiles kernels to see what they write, and leaves the option to Triton.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]


@pytest.fixture
def seen(monkeypatch):
    """A function's kernels, by graph: their names, and of what each writes.

    The CPU stands for a GPU, and tensors have no values: nothing runs.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses import FakeTensorMode

    from batchnorm.kernels.triton import operators  # noqa: F401 - which look into the kernels

    monkeypatch.setattr(triton, "INTERPRETED", True)
    torch._dynamo.reset()
    graphs = []

    def keep(made, inputs):
        graphs.append(
            [
                (
                    kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__,
                    sorted(node.kwargs["tensors_to_clone"]),
                )
                for node in made.graph.nodes
                if "triton_kernel_wrapper" in str(node.target)
            ]
        )
        return make_boxed_func(made.forward)

    def look(layer, *args, **options):
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        y = torch.compile(layer, fullgraph=True, backend=backend, **options)(*args)
        y.backward(torch.empty_like(y))
        return graphs

    with absent(90), FakeTensorMode():
        yield look
    torch._dynamo.reset()


def test_two_passes(seen):
    layer = BatchNorm(64, activation="relu")
    x = torch.empty(32, 64, 28, 28, dtype=torch.bfloat16).requires_grad_()
    forward, backward = seen(layer, x)
    assert forward == [
        ("moments_kernel", ["partial"]),
        ("normalize_kernel", ["statistics", "y"]),
    ]
    assert backward == [
        ("sums_kernel", ["partial"]),
        ("gradient_kernel", ["d_bias", "d_weight", "dx"]),
    ]


def test_whole(seen):
    x = torch.empty(64, 10).requires_grad_()
    forward, backward = seen(BatchNorm(10), x)
    assert forward == [("whole_kernel", ["statistics", "y"])]
    assert backward == [("whole_gradient_kernel", ["d_bias", "d_weight", "dx"])]


def test_sizes_that_vary_are_left_to_the_call(seen):
    """How to cut a tensor is decided by its sizes: so the operator stays one."""
    x = torch.empty(32, 64, 28, 28).requires_grad_()
    assert seen(BatchNorm(64), x, dynamic=True) == [[], []]
