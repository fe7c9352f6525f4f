"""What Triton makes of the kernels for a GPU that need not be there: its machine code, looked at.

The functions under test are called as ever, on tensors without memory; each kernel that they launch
is compiled for the arguments of that launch, and not run. Triton brings the assembler with it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

#: Of a multiprocessor, from sm_80 on.
REGISTERS = 65536
THREADS = 2048

_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-z_0-9]+|\.L\d::[a-z_]+)*?(\.v\d)?\.[bfsu](\d+)\b")


@dataclass(frozen=True)
class Code:
    """A kernel, compiled for one launch.

    Attributes:
        name: the kernel's.
        grid: how many programs.
        warps: of a program.
        registers: of a thread.
        stack: bytes of a thread that are in memory: what has no register.
        shared: bytes of a program.
        loads, stores: how many accesses of a thread to global memory are in the code, by the bits
            of a number and the bytes of the access: {(32, 16): 4} are four of 16 bytes.
    """

    name: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    stack: int
    shared: int
    loads: Counter[tuple[int, int]]
    stores: Counter[tuple[int, int]]

    @property
    def resident(self) -> int:
        """Threads that a multiprocessor has room for, by their registers."""
        of_program = 32 * self.warps
        # Registers are given to a warp in units of 256.
        programs = REGISTERS // (-(-self.registers // 8) * 8 * of_program)
        return min(programs, THREADS // of_program) * of_program


class _Absent:
    """As much of a GPU as it takes to compile for it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def absent(capability: int) -> Iterator[None]:
    """Triton compiles for such a GPU."""
    before = driver._active
    driver.set_active(_Absent(capability))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def compiled(capability: int) -> Iterator[list[Code]]:
    """A list that gets the code of each kernel launched inside, instead of the launch."""
    codes: list[Code] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        codes.append(_read(made, tuple(grid)))
        return made

    JITFunction.run = compile_only
    try:
        with absent(capability):
            yield codes
    finally:
        JITFunction.run = run


def _read(made: Any, grid: tuple[int, ...]) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown.stdout)}
    accesses = {"ld": Counter(), "st": Counter()}
    for kind, many, bits in _ACCESS.findall(made.asm["ptx"]):
        accesses[kind][int(bits), int(many[2:] or 1) * int(bits) // 8] += 1
    return Code(
        made.metadata.name,
        grid,
        made.metadata.num_warps,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        made.metadata.shared,
        accesses["ld"],
        accesses["st"],
    )
