"""What is measured: shapes, passes, fusions, and the bytes that each of them has to move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from batchnorm.errors import ArgumentError

#: forward: in training, recorded by autograd. forward+backward: and the gradients of x, the
#: residual, weight and bias for a fixed random cotangent. inference: eval(), under no_grad().
PASSES = ("forward", "forward+backward", "inference")

FUSIONS = ("bn", "bn+relu", "bn+add+relu")

#: A size of the sweep is measured without fusions, which would say the same again.
SIZE_PASSES, SIZE_FUSION = ("forward", "forward+backward"), "bn"

#: How many times the bytes of one tensor (B) a pass moves at the least, when what it needs twice is
#: still in the cache the second time. Forward: x in, y out; the residual in. Backward: x and the
#: cotangent in, the gradient out; the residual's gradient out; the sign of y counts as nothing, for
#: it fits into a bit. So backward alone is 3B, 3B, 4B, and forward+backward the sum of the two.
FLOORS: Mapping[tuple[str, str], int] = MappingProxyType(
    {
        ("forward", "bn"): 2,
        ("forward", "bn+relu"): 2,
        ("forward", "bn+add+relu"): 3,
        ("forward+backward", "bn"): 2 + 3,
        ("forward+backward", "bn+relu"): 2 + 3,
        ("forward+backward", "bn+add+relu"): 3 + 4,
        ("inference", "bn"): 2,
        ("inference", "bn+relu"): 2,
        ("inference", "bn+add+relu"): 3,
    }
)

#: The same where what is needed twice comes from memory twice, as it must of a tensor that no cache
#: holds: x once more forward; x and the cotangent (or what is left of it by relu's mask) backward.
#: With the residual's gradient written in the first reading, the second reads that in its place.
TWO_PASS: Mapping[tuple[str, str], int] = MappingProxyType(
    {
        ("forward", "bn"): 3,
        ("forward", "bn+relu"): 3,
        ("forward", "bn+add+relu"): 4,
        ("forward+backward", "bn"): 3 + 5,
        ("forward+backward", "bn+relu"): 3 + 5,
        ("forward+backward", "bn+add+relu"): 4 + 6,
        ("inference", "bn"): 2,
        ("inference", "bn+relu"): 2,
        ("inference", "bn+add+relu"): 3,
    }
)

#: A copy reads a tensor and writes a tensor.
COPY = 2


@dataclass(frozen=True)
class Case:
    """One tensor to normalise; channels are on axis 1."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def name(self) -> str:
        """The shape, such as 32x64x56x56."""
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        """The dtype without torch's prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def layout(self) -> str:
        """How the elements lie in memory."""
        if len(self.shape) == 2:
            return "dense"
        return "channels-last" if self.channels_last else "contiguous"

    @property
    def title(self) -> str:
        """All that tells this case from the others.

        >>> Case((32, 64, 56, 56), torch.bfloat16, channels_last=True).title
        '32x64x56x56 bfloat16 channels-last'
        """
        return f"{self.name} {self.dtype_name} {self.layout}"

    @property
    def bytes(self) -> int:
        """The bytes of one tensor: B."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Suite:
    """What one command measures.

    Attributes:
        cases: every pass and fusion of these.
        compiled: the cases that torch.compile takes part in: compiling takes seconds each.
        sizes: tensors of growing size, for the cost of a byte.
        rounds: how often each contender is timed in a process.
        processes: how many processes do all of it, one after the other; see estimate.between.
        minutes: what it takes on two quiet cores; means nothing of a suite for a GPU.
        device: what it is for.
    """

    cases: tuple[Case, ...]
    compiled: frozenset[Case]
    sizes: tuple[Case, ...]
    rounds: int
    processes: int
    minutes: float
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """How many measurements a process makes."""
        return len(self.cases) * len(FUSIONS) * len(PASSES) + len(self.sizes) * len(SIZE_PASSES)

    def matching(self, text: str) -> Suite:
        """Return the part of the suite whose titles contain the text."""

        def chosen(cases: tuple[Case, ...]) -> tuple[Case, ...]:
            return tuple(case for case in cases if text.lower() in case.title)

        part = replace(self, cases=chosen(self.cases), sizes=chosen(self.sizes))
        return replace(part, minutes=self.minutes * part.steps / self.steps)


def find(name: str, text: str = "") -> Suite:
    """Return the suite of that name, reduced to the cases whose titles contain the text.

    Raises:
        ArgumentError: there is no such suite, or no such case in it.
    """
    every = {**SUITES, **GPU_SUITES}
    if name not in every:
        raise ArgumentError(
            f"There is no suite called {name!r}. Expected one of: {', '.join(every)}."
        )
    suite = every[name].matching(text)
    if not suite.steps:
        known = ", ".join(case.title for case in every[name].cases)
        elsewhere = "".join(
            f" The {other} suite has some: add --suite {other}."
            for other, whole in SUITES.items()
            if whole.matching(text).steps
        )
        raise ArgumentError(
            f"No case of the {name} suite has {text!r} in its name.{elsewhere} Expected part of "
            f"one of: {known}."
        )
    return suite


def _sizes(largest: int) -> tuple[Case, ...]:
    """Images of 64 channels from 1 KB up, each twice as large as the one before.

    Planes grow first and then the batch, as they do from the last layers of a network to the first.
    """
    planes = [(n, side) for side in (1, 2, 4, 8, 16, 32) for n in (4, 8)]
    batches = [(n, 64) for n in (4, 8, 16, 32, 64)] + [(n, 128) for n in (32, 64, 100)]
    every = tuple(Case((n, 64, side, side)) for n, side in planes + batches)
    return tuple(case for case in every if case.bytes <= largest)


#: Channels and side of the batch norms in a ResNet-50 for images of 224 × 224.
_RESNET_50 = (
    *((64, 112), (64, 56), (256, 56), (128, 28), (512, 28)),
    *((256, 14), (1024, 14), (512, 7), (2048, 7)),
)

_RESNETS = tuple(Case((n, c, side, side)) for n in (8, 32) for c, side in _RESNET_50)

_DENSE = tuple(map(Case, ((64, 10), (64, 256), (16384, 10), (4096, 1024), (65536, 64))))

_OTHERS = (
    Case((2, 64, 32, 32)),
    Case((32, 128, 512)),
    Case((8, 16, 32, 32, 32)),
    Case((32, 64, 56, 56), channels_last=True),
    Case((4096, 1024), torch.bfloat16),
    Case((32, 64, 56, 56), torch.bfloat16),
    Case((32, 64, 56, 56), torch.bfloat16, channels_last=True),
)

_FULL = (*_DENSE, *_RESNETS, *_OTHERS)

#: One of each kind, none of them large: batch 8 where the full suite has a kind only at 32.
_QUICK = (
    *map(Case, ((64, 10), (64, 256), (16384, 10))),
    *map(Case, ((2, 64, 32, 32), (8, 256, 14, 14), (8, 2048, 7, 7), (32, 128, 512))),
    Case((8, 64, 56, 56), channels_last=True),
    Case((8, 64, 56, 56), torch.bfloat16),
)

#: To compile all passes and fusions of a case takes ten seconds.
_QUICK_COMPILED = frozenset({Case((2, 64, 32, 32))})

#: Processes: three are the fewest of which one may be far off without moving the median. Rounds: of
#: twelve in all, two that were disturbed do not widen the interval; see estimate.
SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "quick": Suite(_QUICK, _QUICK_COMPILED, _sizes(16 << 20), 3, processes=4, minutes=1.2),
        "full": Suite(_FULL, frozenset(_FULL), _sizes(400 << 20), 5, processes=3, minutes=30),
    }
)


def _images(dtype: torch.dtype, channels_last: bool, *shapes: tuple[int, int]) -> tuple[Case, ...]:
    """Channels and side of batches of 256."""
    return tuple(Case((256, c, side, side), dtype, channels_last) for c, side in shapes)


_HALF, _BRAIN = torch.float16, torch.bfloat16

#: What torch.compile takes part in: one of each kind.
_GPU_COMPILED = (
    *_images(_BRAIN, True, (256, 56), (64, 112), (512, 28), (2048, 7)),
    *_images(_BRAIN, False, (256, 56)),
    Case((65536, 1024), _BRAIN),
    Case((20, 6, 65536), _HALF),
)

#: Few channels with long runs of values, where a program for each channel leaves a GPU idle.
SMALL_C = (
    Case((20, 6, 65536), _HALF),
    Case((20, 6, 65536), _BRAIN),
    Case((8, 16, 64, 64, 64), _BRAIN),
    Case((8, 16, 64, 64, 64)),
)

#: The first are worth the most, should time run out.
_GPU = tuple(
    dict.fromkeys(
        (
            *_GPU_COMPILED,
            *SMALL_C,
            *_images(_HALF, True, (64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)),
            *_images(_BRAIN, True, *_RESNET_50),
            *_images(_BRAIN, False, (64, 112), (512, 28), (2048, 7)),
            *_images(torch.float32, False, (64, 112), (256, 56)),
            *_images(torch.float32, True, (256, 56)),
            *(Case((4096, 1024), _BRAIN), Case((64, 256)), Case((64, 256, 4096), _BRAIN)),
            # In and out of the cache: large enough for the one, small enough for the other.
            *(Case((32, 256, 14, 14), _BRAIN, channels_last=True), Case((4096, 256), _BRAIN)),
            *(Case((2, 64, 32, 32)), Case((2, 64, 32, 32), _BRAIN)),
        )
    )
)

_REHEARSED = (
    *(Case((4, 3, 5, 5), _BRAIN, channels_last=True), Case((64, 4), _BRAIN)),
    *(Case((3, 2, 40), _HALF), Case((4, 2))),
)

#: For a GPU, in one process each: its memory lies as it lies, and the time of a whole session is
#: short. And the same on the CPU with almost nothing to do, to see that every part works.
GPU_SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "gpu": Suite(_GPU, frozenset(_GPU_COMPILED), (), 7, processes=1, minutes=5, device="cuda"),
        "rehearsal": Suite(_REHEARSED, frozenset(_REHEARSED[:1]), (), 2, processes=1, minutes=1),
    }
)
