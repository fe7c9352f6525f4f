"""From tensors to launches: the five operations that every set of kernels has.

Signatures, flags and results are those of native/ops.cpp, except that a count which a mask decides
is a tensor, and that nothing is known of channels that refuse an update: to ask would stall the
device. What is not served is left untouched.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import calls
from batchnorm.kernels.reference import LEAKY_SLOPE
from batchnorm.kernels.triton.plans import MERGED, PARTS, STAGES, Plan, arrangement, plan, power_of_two

Count = float | Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_VECTORS = (*_FLOATS, torch.float64)

#: eps and its inverse square root must be numbers of float32 too.
EPS_RANGE = (1e-30, 1e30)

#: What Triton would else warn of, or decide by itself: products and sums fuse; and loops keep the
#: loads of as many tiles in flight as they say themselves.
COMPILED = {"enable_fp_fusion": True, "num_stages": 1}

_kernels: list[ModuleType] = []


def kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules of kernels, imported when they are wanted first."""
    if not _kernels:
        from batchnorm.kernels.triton import backward_kernels, forward_kernels, moment_kernels

        _kernels.extend((moment_kernels, forward_kernels, backward_kernels))
    of_moments, of_forward, of_backward = _kernels
    return of_moments, of_forward, of_backward


class Operand:
    """x, dense in some order of its axes, its mask in the same order, and how they are cut."""

    def __init__(self, x: Tensor, channel: int, mask: Tensor | None) -> None:
        shape = x.shape
        found = arrangement(shape, x.stride(), channel)
        if found is None:
            x = x.contiguous()
            found = arrangement(shape, x.stride(), channel)
        self.x, self.outer, self.channels, self.inner = x, found.outer, found.channels, found.inner
        self.plan: Plan = plan(self.outer, self.channels, self.inner, x.element_size())
        self.mask = mask
        if mask is not None:
            mask = mask.permute(found.order).contiguous()
            self.mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask

    @property
    def count(self) -> int:
        """Elements of a channel."""
        return self.outer * self.inner

    def arranged(self, other: Tensor) -> Tensor:
        """The same values in x's order of memory."""
        if other.stride() == self.x.stride() and other.shape == self.x.shape:
            return other
        return torch.empty_like(self.x, dtype=other.dtype).copy_(other)

    def cut(self) -> tuple[int, ...]:
        """What every kernel is told of the shape."""
        return self.outer, self.channels, self.inner // self.plan.unit

    def passes(self) -> tuple[int, ...]:
        """What the kernels of two passes are told besides."""
        return self.plan.tiles_i, self.plan.tiles, self.plan.per_split

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        rows, block, run = self.plan.tile
        of_rows, of_run = self.plan.in_threads
        return {
            "UNIT": self.plan.unit,
            "BO": rows,
            "BC": block,
            "BI": run,
            "RO": of_rows,
            "RI": of_run,
            "WIDE": self.plan.wide,
            "STAGES": STAGES,
            "num_warps": self.plan.warps,
            **COMPILED,
        }

    @property
    def parts(self) -> int:
        """How many parts are merged at once."""
        return min(PARTS, power_of_two(self.plan.splits))

    def numbers(self, *shape: int) -> Tensor:
        """Room for float64 numbers on x's device."""
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)


def doubled(value: float) -> tuple[float, float]:
    """A number as the two float32 that a kernel can be given."""
    high = torch.tensor(value, dtype=torch.float32).item()
    return high, value - high


def served(
    x: Tensor, vectors: tuple[Tensor | None, ...], eps: float, channel_dim: int, flags: int
) -> bool:
    """Whether the kernels can do this: dtypes, devices, sizes."""
    if x.dim() < 2 or x.numel() == 0 or not -x.dim() <= channel_dim < x.dim():
        return False
    size = flags >> calls.GROUP_BIT
    samples = x.shape[0 if channel_dim % x.dim() else 1]
    return (
        (size == 0 or size >= samples)
        and (flags & calls.ACTIVATION) <= 2
        and EPS_RANGE[0] <= eps <= EPS_RANGE[1]
        and all(is_vector(v, x, channel_dim) for v in vectors)
    )


def is_vector(vector: Tensor | None, x: Tensor, channel_dim: int) -> bool:
    """Whether this has a number for each channel, where the kernels can read and write it."""
    return vector is None or (
        vector.shape == x.shape[channel_dim : channel_dim + 1 or None]
        and vector.device == x.device
        and vector.dtype in _VECTORS
        and vector.is_contiguous()
    )


def is_like(tensor: Tensor | None, x: Tensor) -> bool:
    """Whether this has a number for each element, where the kernels can read it."""
    return tensor is None or (
        tensor.shape == x.shape and tensor.device == x.device and tensor.dtype in _FLOATS
    )


def device_of(x: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float,
    eps: float,
    channel_dim: int,
    flags: int,
) -> tuple[Tensor, Tensor | None, Count, int]:
    """y, its statistics (mean and biased variance, float64), the count behind them, and 0.

    In training the running statistics take the batch in, unless `LATER` is set.
    """
    refused: Any = (x, None, 0.0, calls.NOT_SERVED)
    training = bool(flags & calls.TRAINING)
    if (
        not served(x, (weight, bias, running_mean, running_var), eps, channel_dim, flags)
        or not is_like(residual, x)
        or (running_mean is None) != (running_var is None)
        or (running_mean is None and not training)
        or not is_counter(counter, x)
    ):
        return refused
    of = Operand(x, channel_dim % x.dim(), mask if training else None)
    if training and mask is None and of.count < 2:
        return refused
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(of.x, dtype=dtype)
    added = None if residual is None else of.arranged(residual)
    eps_pair = doubled(eps)
    with device_of(x):
        if not training:
            statistics = None
            if flags & calls.KEEP:
                statistics = torch.stack((running_mean, running_var)).to(torch.float64)
            given = (running_mean, running_var) if statistics is None else statistics.unbind()
            _normalize(of, added, y, weight, bias, given, eps_pair, flags)
            return y, statistics, 0.0, 0
        plain_average = momentum == calls.PLAIN_AVERAGE
        later = bool(flags & calls.LATER) or plain_average
        running = (None, None, None) if later else (running_mean, running_var, counter)
        statistics, count = _train(
            of, added, y, weight, bias, (*running, *doubled(momentum)), eps_pair, flags
        )
    if plain_average and running_mean is not None and not flags & calls.LATER:
        update(*statistics.unbind(), count, running_mean, running_var, counter, momentum)
    return y, statistics, count, 0


def _train(
    of: Operand,
    added: Tensor | None,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Any, ...],
    eps: tuple[float, float],
    flags: int,
) -> tuple[Tensor, Count]:
    _, of_forward, _ = kernels()
    statistics = of.numbers(2, of.channels)
    count = None if of.mask is None else of.numbers()
    known: Count = float(of.count) if count is None else count
    if of.plan.whole:
        of_forward.whole_kernel[(of.plan.blocks,)](
            *(of.x, of.mask, added, y, weight, bias, statistics, count, *running, *eps, *of.cut()),
            **of.constants(),
            **_activation(flags),
        )
        return statistics, known
    partial = _partial_moments(of)
    if of.plan.folds:
        merge = partial, statistics, count, *running
        _normalize(of, added, y, weight, bias, (None, None), eps, flags, merge)
    else:
        _finish(of, partial, statistics, count, running)
        _normalize(of, added, y, weight, bias, statistics.unbind(), eps, flags)
    return statistics, known


def _partial_moments(of: Operand) -> Tensor:
    of_moments, _, _ = kernels()
    partial = of.numbers(3, of.plan.splits, of.channels)
    of_moments.moments_kernel[(of.plan.blocks, of.plan.splits)](
        of.x, of.mask, partial, *of.cut(), *of.passes(), **of.constants()
    )
    return partial


def _finish(
    of: Operand,
    partial: Tensor,
    statistics: Tensor,
    count: Tensor | None,
    running: tuple[Any, ...],
) -> None:
    of_moments, _, _ = kernels()
    of_moments.finish_kernel[(-(-of.channels // MERGED),)](
        *(partial, statistics, count, *running, of.channels, of.plan.splits),
        BC=MERGED,
        BS=of.parts,
        num_warps=4,
        **COMPILED,
    )


def _normalize(
    of: Operand,
    added: Tensor | None,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given: tuple[Any, ...],
    eps: tuple[float, float],
    flags: int,
    merge: tuple[Any, ...] = (None, None, None, None, None, None, 0.0, 0.0),
) -> None:
    """y by the moments given, or by those that are to be merged."""
    _, of_forward, _ = kernels()
    # A pass alone has no parts to merge, and no reason to cut further than the tiles.
    blocks, splits = of.plan.blocks, of.plan.splits
    of_forward.normalize_kernel[(blocks, splits)](
        *(of.x, added, y, weight, bias, *given, *merge, *eps, *of.cut(), *of.passes(), splits),
        BS=of.parts,
        **of.constants(),
        **_activation(flags),
    )


def _activation(flags: int) -> dict[str, Any]:
    return {"ACTIVATION": flags & calls.ACTIVATION, "SLOPE": LEAKY_SLOPE}


def is_counter(counter: Tensor | None, x: Tensor) -> bool:
    """Whether this is a number of batches that the kernels can change."""
    return counter is None or (
        counter.dtype is torch.int64 and counter.numel() == 1 and counter.device == x.device
    )


def update(
    mean: Tensor,
    var: Tensor,
    count: Count,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor | None,
    momentum: float,
) -> int:
    """The running statistics alone take the batch in; 0."""
    of_moments, _, _ = kernels()
    pointer, known = (count, 0.0) if isinstance(count, Tensor) else (None, count)
    together = momentum == calls.PLAIN_AVERAGE
    with device_of(running_mean):
        of_moments.update_kernel[(1,)](
            *(mean, var, pointer, *doubled(known), running_mean, running_var, counter),
            *(*doubled(momentum), len(running_mean)),
            TOGETHER=together,
            BC=min(1024, power_of_two(len(running_mean))),
            num_warps=4,
            **COMPILED,
        )
    return 0


def moments(
    x: Tensor, mask: Tensor | None, channel_dim: int, flags: int
) -> tuple[Tensor | None, Count, int]:
    """The statistics alone, and the total weight behind them."""
    if not served(x, (), 1.0, channel_dim, flags):
        return None, 0.0, calls.NOT_SERVED
    of = Operand(x, channel_dim % x.dim(), mask)
    statistics = of.numbers(2, of.channels)
    count = None if mask is None else of.numbers()
    with device_of(x):
        _finish(of, _partial_moments(of), statistics, count, (None, None, None, 0.0, 0.0))
    return statistics, float(of.count) if count is None else count, 0


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    sums: Tensor | None,
    count: Count,
    eps: float,
    channel_dim: int,
    flags: int,
) -> Gradients:
    """Gradients of x, of z (None: it is dy), of γ and of β; those that the flags want.

    With the sums of all who share the moments given, dx is by those, and γ and β get none.
    """
    activation = flags & calls.ACTIVATION
    if not _fits_backward(dy, x, y, statistics, weight, bias, eps, channel_dim, flags) or (
        flags & calls.WANT_RESIDUAL and activation and y is None
    ):
        return None, None, None, None, calls.NOT_SERVED
    training = bool(flags & calls.TRAINING)
    of = Operand(x, channel_dim % x.dim(), mask)
    dy = of.arranged(dy)
    sign = None if y is None or not activation else of.arranged(y)
    dx = torch.empty_like(of.x) if flags & calls.WANT_X else None
    writes = flags & calls.WANT_RESIDUAL and (activation or mask is not None)
    dz = torch.empty_like(dy) if writes else None
    d_weight = d_bias = None
    if flags & calls.WANT_PARAMETERS:
        like = weight if weight is not None else bias
        dtype = torch.float64 if like is None else like.dtype
        d_weight, d_bias = torch.empty(2, of.channels, dtype=dtype, device=x.device).unbind()
    pointer, known = (count, 0.0) if isinstance(count, Tensor) else (None, float(count))
    counted = pointer, *doubled(known)
    eps_pair = doubled(eps)
    _, _, of_backward = kernels()
    with device_of(x):
        if of.plan.whole and sums is None:
            of_backward.whole_gradient_kernel[(of.plan.blocks,)](
                *(dy, of.x, sign, of.mask, dx, dz, statistics, weight, bias, d_weight, d_bias),
                *(*counted, *eps_pair, *of.cut()),
                TRAINING=training,
                **of.constants(),
                **_activation(flags),
            )
            return dx, dz, d_weight, d_bias, 0
        partial = None
        wants_sums = sums is None and (training or d_weight is not None)
        if wants_sums or dz is not None:
            partial = _partial_sums(
                of, dy, sign, dz, statistics, weight, bias, eps_pair, flags, wants_sums
            )
        if dx is None or not training or not of.plan.folds:
            if partial is not None:
                sums = of.numbers(2, of.channels) if training and dx is not None else None
                _finish_sums(of, partial, sums, d_weight, d_bias)
            partial = None
        if dx is None:
            return None, dz, d_weight, d_bias, 0
        # What the first pass has written is all that the second needs of dy and y, unless rounding
        # it has changed it.
        exact = dz is not None and (activation != 2 or dz.dtype is torch.float32)
        source = (dz, of.x, None) if exact else (dy, of.x, sign)
        named = {"ACTIVATION": 0 if exact else activation, "SLOPE": LEAKY_SLOPE}
        outs = (d_weight, d_bias) if partial is not None else (None, None)
        of_backward.gradient_kernel[(of.plan.blocks, of.plan.splits)](
            *(*source, of.mask, dx, statistics, weight, bias),
            *(sums if training else None, partial, *outs),
            *(*counted, *eps_pair, *of.cut(), *of.passes(), of.plan.splits),
            BS=of.parts,
            **of.constants(),
            **named,
        )
    return dx, dz, d_weight, d_bias, 0


def _partial_sums(
    of: Operand,
    dy: Tensor,
    sign: Tensor | None,
    dz: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: tuple[float, float],
    flags: int,
    wants_sums: bool = True,
) -> Tensor | None:
    _, _, of_backward = kernels()
    partial = of.numbers(2, of.plan.splits, of.channels) if wants_sums else None
    of_backward.sums_kernel[(of.plan.blocks, of.plan.splits)](
        *(dy, of.x, sign, of.mask, dz, statistics, weight, bias, partial),
        *(*eps, *of.cut(), *of.passes()),
        **of.constants(),
        **_activation(flags),
    )
    return partial


def _finish_sums(
    of: Operand,
    partial: Tensor,
    sums: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    _, _, of_backward = kernels()
    of_backward.finish_sums_kernel[(-(-of.channels // MERGED),)](
        *(partial, sums, d_weight, d_bias, of.channels, of.plan.splits),
        BC=MERGED,
        BS=of.parts,
        num_warps=4,
        **COMPILED,
    )


def _fits_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channel_dim: int,
    flags: int,
) -> bool:
    return (
        served(x, (weight, bias), eps, channel_dim, flags)
        and is_like(dy, x)
        and is_like(y, x)
        and statistics.shape == (2, x.shape[channel_dim])
        and statistics.is_contiguous()
    )


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    channel_dim: int,
    flags: int,
) -> tuple[Tensor | None, int]:
    """The first half alone: Σdz and Σdz·x̂ of each channel, float64, for `backward` to be given."""
    if not _fits_backward(dy, x, y, statistics, weight, bias, eps, channel_dim, flags):
        return None, calls.NOT_SERVED
    of = Operand(x, channel_dim % x.dim(), mask)
    sign = None if y is None or not flags & calls.ACTIVATION else of.arranged(y)
    sums = of.numbers(2, of.channels)
    with device_of(x):
        partial = _partial_sums(
            of, of.arranged(dy), sign, None, statistics, weight, bias, doubled(eps), flags
        )
        assert partial is not None  # noqa: S101 - for mypy
        _finish_sums(of, partial, sums, None, None)
    return sums, 0
