"""Compiled kernels are kept by all that decides how Triton compiles, and called as Triton would."""

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from batchnorm.kernels import calls, triton
from batchnorm.kernels.triton import launch, launcher

if triton.INTERPRETED:
    pytest.skip("Triton's interpreter is on: nothing is compiled", allow_module_level=True)


@pytest.fixture
def launched(monkeypatch):
    """Launches, with their arguments, that do not happen."""
    seen = []
    monkeypatch.setattr(launch, "launch", lambda *call: seen.append(call))
    return seen


def step(shape, dtype=torch.float32, *, shift=0, last=False, mask=None, eps=1e-5, residual=False):
    """A training step on tensors that start so many elements after an aligned address."""

    def elements():
        n = torch.Size(shape).numel()
        x = torch.zeros(n + shift, dtype=dtype)[shift:].view(shape)
        return x.movedim(-1, 1) if last else x

    x = elements()
    channels = x.shape[1]
    weight, bias, mean, var = (torch.ones(channels) for _ in range(4))
    mask = None if mask is None else torch.ones(x.shape[0], 1, *x.shape[2:], dtype=mask)
    flags = calls.TRAINING | calls.ACTIVATIONS["relu"]
    y, statistics, count, served = launch.forward(
        *(x, weight, bias, elements() if residual else None, mask, mean, var, torch.tensor(0)),
        *(0.1, eps, 1, flags | calls.KEEP),
    )
    assert served == 0
    flags |= calls.WANT_X | calls.WANT_PARAMETERS
    launch.backward(
        *(elements(), x, y if residual else None, statistics, weight, bias, mask, None),
        *(count, eps, 1, flags),
    )


CALLS = [
    {"shape": shape, **options}
    for shape in ((4, 6, 5, 7), (64, 16, 32, 32), (64, 16, 32, 33), (64, 17, 32, 32), (1, 1, 20000))
    for options in (
        {},
        {"dtype": torch.bfloat16},
        {"shift": 1},
        {"shift": 4},
        {"eps": 1e-3},
        {"mask": torch.bool},
        {"mask": torch.float64},
        {"residual": True},
    )
] + [
    {"shape": (70000, 64)},  # parts that a launch of its own merges
    *({"shape": shape, "last": True} for shape in ((64, 9, 9, 16), (640, 3, 3, 17))),
]


def test_what_is_kept_is_what_triton_would_compile(launched):
    for options in CALLS:
        step(**options)
    assert len({call[0].fn.__name__ for call in launched}) == 8
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    found = {}
    for kernel, _, _, args, constants, warps in launched:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        options = {"num_warps": warps, **launcher.COMPILED}
        bound, specialization, _ = bind(*args, *constants, **options)
        # The arguments as Triton hands them on: in this order, the constants last.
        given = [*args, *constants]
        assert len(bound) == len(given)
        assert all(a is b or a == b for a, b in zip(bound.values(), given, strict=True))
        key = kernel.fn.__name__, warps, constants, launcher.kinds(args)
        assert found.setdefault(key, specialization) == specialization, key
    # Another eps is no reason to compile, another alignment is.
    assert len(found) < len(launched)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which kernels compile")
def test_where_nothing_can_be_compiled_plain_torch_computes():
    triton._broken.cache_clear()
    with pytest.warns(UserWarning, match="plain torch computes in place of kernels: Triton cannot"):
        assert "Triton cannot compile here: " in triton._broken(0)
    assert triton._broken(0) is not None  # and that is told once
    triton._broken.cache_clear()
