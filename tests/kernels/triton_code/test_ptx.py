"""The kernels as a GPU would get them: compiled for every way of cutting a tensor, and looked at.

No GPU is needed. What is asked here decides about speed alone; values are tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from batchnorm.kernels import calls, triton
from batchnorm.kernels.triton import launch
from batchnorm.kernels.triton.operand import Operand

if triton.INTERPRETED:
    pytest.skip("Triton's interpreter is on: nothing is compiled", allow_module_level=True)

from machine_code import Code, compiled

#: Bytes that must be on their way to a multiprocessor: 3.35 TB/s · 700 ns over 132 of them. (An
#: A100 needs fewer: 2 TB/s · 600 ns over 108.)
IN_FLIGHT = 17_800

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A call in both directions, and what its memory allows.

    Attributes:
        shape: of x.
        last: whether x is channels-last.
        activation: 0 none, 1 relu, 2 leaky relu.
        residual: whether one is added.
        affine: whether there are γ and β.
        mask: its dtype, or None.
        whole: whether one launch each way does it.
        dense: the dtypes in which every access to elements can be one of 16 bytes.
        size: samples in a group, 0 for all in one.
    """

    shape: tuple[int, ...]
    last: bool = False
    activation: int = 0
    residual: bool = False
    affine: bool = True
    mask: torch.dtype | None = None
    whole: bool = False
    dense: tuple[str, ...] = ("bfloat16", "float16", "float32")
    size: int = 0

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), "last" if self.last else "first"]
        words += [("", "relu", "leaky")[self.activation], "residual" if self.residual else ""]
        words += [] if self.affine else ["bare"]
        words += [str(self.mask).removeprefix("torch.")] if self.mask else []
        words += [f"by{self.size}"] if self.size else []
        return "-".join(word for word in words if word)


CASES = [
    Case((256, 64, 56, 56), activation=1, residual=True),
    Case((256, 64, 56, 56), last=True, activation=1, residual=True),
    Case((256, 64, 56, 56), last=True, activation=1),
    Case((256, 64, 56, 56), last=True),
    Case((64, 256, 14, 14), activation=2, dense=("float32",)),  # 196 elements: 4 in a unit
    Case((256, 512, 7, 7), activation=1, residual=True, dense=()),
    Case((256, 24, 56, 56), last=True),
    Case((4096, 1024)),
    Case((16384, 10), activation=1, dense=()),
    Case((20, 6, 65536)),
    Case((8, 3, 224, 224)),
    Case((2, 3, 2**31 + 8)),  # indices of 64 bits
    Case((64, 64, 2**20), affine=False),
    Case((32, 64, 28, 28), activation=1, mask=torch.bool),
    Case((32, 64, 28, 28), last=True, mask=torch.float32),
    Case((64, 10), whole=True, dense=()),
    Case((64, 256), activation=1, whole=True),
    Case((32, 512, 7, 7), activation=1, residual=True, whole=True, dense=()),
    Case((128, 256, 8, 8), whole=True),
    Case((256, 64, 56, 56), activation=1, residual=True, size=32),
    Case((250, 64, 56, 56), last=True, activation=1, size=32),
    Case((4096, 256), size=32, whole=True),
]


def launched(case: Case, dtype: torch.dtype, capability: int) -> tuple[Operand, list[Code]]:
    """The code of all kernels of a training step, on tensors that have no memory."""

    def elements() -> torch.Tensor:
        x = torch.empty(case.shape, dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last) if case.last else x

    def numbers() -> torch.Tensor:
        # Of 64 bits, to tell accesses to them from those to elements.
        return torch.empty(case.shape[1], dtype=torch.float64, device="meta")

    x = elements()
    residual = elements() if case.residual else None
    mask = None
    if case.mask is not None:
        mask = torch.empty((case.shape[0], 1, *case.shape[2:]), dtype=case.mask, device="meta")
    weight, bias = (numbers(), numbers()) if case.affine else (None, None)
    counter = torch.empty((), dtype=torch.int64, device="meta")
    flags = case.activation | calls.TRAINING | case.size << calls.GROUP_BIT
    with compiled(capability) as codes:
        y, statistics, count, served = launch.forward(
            *(x, weight, bias, residual, mask, numbers(), numbers(), counter),
            *(0.1, 1e-5, 1, flags | calls.KEEP),
        )
        assert served != calls.NOT_SERVED
        flags |= calls.WANT_X
        flags |= calls.WANT_PARAMETERS if case.affine else 0
        flags |= calls.WANT_RESIDUAL if case.residual else 0
        sign = y if case.residual and case.activation else None
        *_, served = launch.backward(
            *(elements(), x, sign, statistics, weight, bias, mask, None, count, 1e-5, 1, flags)
        )
        assert served != calls.NOT_SERVED
    return Operand.of(x, 1, mask, flags), codes


def narrow(accesses: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Accesses to elements of fewer than 16 bytes."""
    return {
        access: n for access, n in sorted(accesses.items()) if access[0] < 64 and access[1] < 16
    }


def in_flight(code: Code, of: Operand, case: Case) -> int:
    """Bytes that a multiprocessor waits for, if each thread asks for its part of a tile at once."""
    sign = case.residual and case.activation > 0
    tensors = {"moments_kernel": 1, "normalize_kernel": 1 + case.residual, "sums_kernel": 2 + sign}
    rows, block, run = of.plan.tile
    of_program = rows * block * run * of.x.element_size() * tensors.get(code.name, 2)
    return of_program * code.resident // (32 * code.warps)


PASSES = ("moments_kernel", "normalize_kernel", "sums_kernel", "gradient_kernel")
ALL_AT_ONCE = ("whole_kernel", "whole_gradient_kernel")


def parameters() -> list[Any]:
    """Every case on a GPU of each kind, and in a dtype of each size."""
    return [
        pytest.param(case, dtype, chip, id=f"sm{chip}-{dtype}-{case.name}", marks=marks)
        for dtype, chip, cases, marks in (
            ("bfloat16", 90, CASES, ()),
            ("float32", 80, CASES[::2], pytest.mark.slow),
            ("float16", 80, CASES[1::2], pytest.mark.slow),
        )
        for case in cases
    ]


@pytest.mark.parametrize(("case", "dtype", "capability"), parameters())
def test_kernels_fit_the_machine(case: Case, dtype: str, capability: int) -> None:
    of, codes = launched(case, DTYPES[dtype], capability)
    large = [code for code in codes if code.name in (*PASSES, *ALL_AT_ONCE)]
    assert tuple(code.name for code in large) == (ALL_AT_ONCE if case.whole else PASSES)
    for code in codes:
        assert code.spills == 0, f"{code.name} has too few registers"
    for code in large:
        if dtype in case.dense and case.mask is None:
            assert not narrow(code.loads), code
            assert not narrow(code.stores), code
        if not case.whole:
            assert in_flight(code, of, case) >= IN_FLIGHT, code
