"""Statistics that several processes share: as if one of them had the batches of all.

Forward, each process sends what it has, (count, mean, m2), in one message of 2C + 4 numbers, and
merges what comes from all: exact for batches of any sizes, empty ones and masks too. Backward, the
two sums that the gradient needs are added in one message of 2C numbers. Where groups of samples
(ghost batches) cross from one process to the next, they are those of the processes' batches put
together in the order of ranks; then the sizes of the batches are exchanged first, and read.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm.errors import ArgumentError, SyncError
from batchnorm.kernels import select
from batchnorm.moments import Moments
from batchnorm.validation import Settings, check_group_counts

Group = Any
"""None, "world" or a torch.distributed.ProcessGroup: not every build of torch has those."""

#: What `process_group` may be besides None and a group: all processes.
WORLD = "world"

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_group(group: Group) -> None:
    """Refuse what is no process group.

    Raises:
        ArgumentError: it is neither None, "world" nor a group that this process is in.
    """
    if group is None or group == WORLD:
        return
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise ArgumentError(
            f"expected process_group to be None, {WORLD!r} or a torch.distributed process group "
            f"that this process is in, got {group!r}; of a DeviceMesh, take mesh.get_group(), and "
            "where torch.distributed.new_group gave a process -100, it is not in that group"
        )


def resolve(group: Group) -> Group:
    """The group whose processes share; None where there is nobody to share with."""
    if group is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    group = distributed.group.WORLD if group == WORLD else group
    return group if distributed.get_world_size(group) > 1 else None


def is_world(group: Group) -> bool:
    """Whether this is, as an object, the group of all processes."""
    return distributed.is_available() and group is distributed.group.WORLD


class Synchronizer:
    """A process group as a `Pool`.

    The first time, and whenever the caller cannot be sure that all have done so before, processes
    compare what they are about to share. On the CPU they compare some of it each time.

    Args:
        group: of more than one process.
        function: what all of them must call, for the error; None for a layer in training.
    """

    def __init__(self, group: Group, function: str | None = None) -> None:
        # All processes' group is asked for anew: kept here, it would outlive its destruction, and
        # its threads the interpreter (torch 2.13 aborts then, at times).
        self._group = None if group is distributed.group.WORLD else group
        self._identity = id(group)
        self.name: str = group.group_name
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        self.function = function
        self.agreed = False
        self.calls = 0
        self._listens_at = 0.0

    def serves(self, group: Group) -> bool:
        """Whether this is the group, and not another that has come after it."""
        return self._identity == id(group) and self.size == distributed.get_world_size(group)

    @property
    def group(self) -> Group:
        """The process group."""
        return distributed.group.WORLD if self._group is None else self._group

    def agree(
        self,
        x: Tensor,
        settings: Settings,
        *,
        virtual_batch_size: int = 0,
        renorm: bool = False,
        together: bool = False,
    ) -> None:
        """Compare, once, what must be the same on all processes.

        A message of another length than expected ends the process (gloo) or waits for ever (NCCL):
        so this one, whose length does not depend on anything, comes first.

        Raises:
            SyncError: something differs, or a process did not come.
        """
        if self.agreed or torch.compiler.is_compiling():
            return
        momentum, eps, channel_dim, _ = settings
        mine = {
            "number of channels": x.shape[channel_dim],
            **dict(zip(HEADER, header_of(x), strict=False)),
            "virtual_batch_size": virtual_batch_size,
            "renorm": int(renorm),
            "forward_together": int(together),
            "eps": _bits(eps),
            # A tensor's value may be on a device.
            "momentum": _bits(math.nan if isinstance(momentum, Tensor) else momentum),
        }
        sent = torch.tensor(list(mine.values()), dtype=torch.int64, device=x.device)
        compare(self._gather(sent).tolist(), tuple(mine))
        self.agreed = True

    def merge(self, local: Moments, header: tuple[int, ...] = ()) -> tuple[Moments, Moments]:
        """Moments of the elements of all processes.

        Args:
            local: of those here.
            header: as `header_of` makes it; compared where reading it costs nothing.

        Raises:
            SyncError: the headers differ, or a process did not come.
        """
        packed = pack(local)
        # Always there, so that the message has its length; filled in place, which is no wait.
        numbers = [packed.new_full((1,), number) for number in self.numbered(header)]
        gathered = self.gather(torch.cat([*numbers, packed]))
        if select.concrete(gathered):
            compare(gathered[:, : len(HEADER)].tolist(), HEADER)
        merged = unpack(gathered[:, len(HEADER) :]).merged()
        return merged, merged

    def numbered(self, header: tuple[int, ...]) -> tuple[int, ...]:
        """A header with the number of the call: a late one must not pass for another."""
        if not header or torch.compiler.is_compiling():
            return NO_HEADER if not header else (*header, 0)
        self.calls += 1
        return *header, self.calls

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        total: Tensor = _Sum.apply(values, self)
        return total

    def gather(self, values: Tensor) -> Tensor:
        """What all processes have, along a new first axis in the order of ranks."""
        everyones: Tensor = _Gather.apply(values, self)
        return everyones

    def _gather(self, values: Tensor) -> Tensor:
        everyones = values.new_empty((self.size, *values.shape))
        self._run(
            lambda group: _all_gather(everyones.view(-1), values.contiguous().view(-1), group=group)
        )
        return everyones

    def _sum(self, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        self._run(lambda group: distributed.all_reduce(total, group=group))
        return total

    def _run(self, collective: Callable[[Group], None]) -> None:
        if torch.compiler.is_compiling():
            collective(self.group)
            return
        try:
            collective(self.group)
        except RuntimeError as error:
            if not _LOST.search(str(error)):
                raise
            self._tell()
            raise SyncError(self._absence()) from error

    def _tell(self) -> None:
        """Leave word for a process that is not waiting here."""
        with contextlib.suppress(RuntimeError):
            _store().set(self._word, "gone")

    def listen(self) -> None:
        """Ask, at most every second, whether the others have given up waiting for this process.

        Evaluation communicates nothing, so that one process may evaluate alone; one that is in
        evaluation by mistake would otherwise not be told.

        Raises:
            SyncError: they have.
        """
        if torch.compiler.is_compiling() or (now := time.monotonic()) < self._listens_at:
            return
        self._listens_at = now + 1
        gone = False
        with contextlib.suppress(RuntimeError):  # the store's keeper may have left first
            gone = _store().check([self._word])
        if gone:
            raise SyncError(self._absence())

    def _absence(self) -> str:
        if self.function is not None:
            return (
                f"expected all {self.size} processes to call {self.function}; one did not within "
                "the group's time-out, or is gone. Look for the first error among the others' "
                "output"
            )
        return (
            f"expected all {self.size} processes that share statistics to take part in this "
            "training step; one did not within the group's time-out, or is gone. Look for the "
            "first error among the others' output. Is each of them in train() here, and does each "
            "call this layer, and backward on what comes out, equally often? (An empty batch may "
            "be passed; eval() on one rank only, or a loop that ends early, leaves the others "
            "waiting.)"
        )

    @property
    def _word(self) -> str:
        return f"batchnorm/{self.name}/gone"


class SyncedGroups:
    """Groups of samples that may cross from one process to the next, as a `Pool`.

    Of its first and of its last group a process may have a part only.
    """

    def __init__(self, sync: Synchronizer, x: Tensor, channel_dim: int, size: int) -> None:
        self.sync = sync
        samples = x.shape[0 if channel_dim % x.dim() else 1]
        header = sync.numbered(header_of(x))
        sent = torch.tensor([*header, samples], dtype=torch.int64, device=x.device)
        rows: list[list[int]] = sync._gather(sent).tolist()
        compare(rows, HEADER)
        everyones = [row[-1] for row in rows]
        starts = [sum(everyones[:rank]) for rank in range(sync.size)]
        self.lead = starts[sync.rank] % size
        first = [start // size for start in starts]
        last = [(start + max(n, 1) - 1) // size for start, n in zip(starts, everyones, strict=True)]
        mine = first[sync.rank], last[sync.rank]
        # The groups at the ends of what the processes have, by (rank, first or last) as they are
        # sent. Who has a single group sends it as its first.
        ends = [(2 * rank, group) for rank, group in enumerate(first)]
        ends += [(2 * rank + 1, group) for rank, group in enumerate(last) if group > first[rank]]
        self.members = [[row for row, group in ends if group == wanted] for wanted in mine]
        self.shared = [[row for row, of in ends if of == group] for group in {of for _, of in ends}]

    def merge(
        self,
        local: Moments,
        header: tuple[int, ...] = (),  # noqa: ARG002
    ) -> tuple[Moments, Moments]:
        """Moments of each group with samples here, and of all samples everywhere."""
        groups = local.mean.shape[0]
        counts = local.count.reshape(-1, 1).expand(groups, 1)
        local = Moments(counts, local.mean, local.m2)
        rows = torch.cat([counts, local.mean, local.m2], 1)
        own = pack(local.over_groups())
        # The smallest group that nobody else has a share in: all processes must know of one that
        # is too small.
        least = least_count(counts[1:-1]).expand_as(own)
        everyones = self.sync.gather(torch.stack([*self._ends(rows), own, least]))
        total = unpack(everyones[:, 2]).merged()
        ends = everyones[:, :2].flatten(0, 1)
        if select.concrete(ends):
            counts = torch.stack([ends[members, 0].sum() for members in self.shared])
            counts = torch.cat([counts, everyones[:, 3, 0]])
            check_group_counts(counts, whose="a group of all processes' samples")
        merged = [pack(unpack(ends[members]).merged()) for members in self.members]
        rows = self._replace(rows, merged)
        channels = local.mean.shape[1]
        return Moments(rows[:, :1], rows[:, 1 : channels + 1], rows[:, channels + 1 :]), total

    def sum(self, values: Tensor) -> Tensor:
        """The sums of each group with samples here."""
        rows = values.movedim(-2, 0)
        ends = self.sync.gather(torch.stack(self._ends(rows))).flatten(0, 1)
        summed = [ends[members].sum(0) for members in self.members]
        return self._replace(rows, summed).movedim(0, -2)

    @staticmethod
    def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last; nothing as last where there is one."""
        return rows[0], rows[-1] if len(rows) > 1 else torch.zeros_like(rows[0])

    @staticmethod
    def _replace(rows: Tensor, ends: list[Tensor]) -> Tensor:
        """With other first and last ones."""
        first, last = (end[None] for end in ends)
        return torch.cat([first, rows[1:-1], last]) if len(rows) > 1 else first


#: What must be alike in each step, too; and what is sent where there is no such step.
HEADER = ("dtype", "gradient of the input", "number of calls")
NO_HEADER = (-1, 0, 0)

#: What gloo and NCCL say of a time-out or of a connection that is lost.
_LOST = re.compile(
    r"time[ds]?[ -]?out|connection|peer|socket|read error|write error", re.IGNORECASE
)


def header_of(x: Tensor) -> tuple[int, ...]:
    """`HEADER`'s values here."""
    return DTYPES.index(x.dtype) if x.dtype in DTYPES else -1, int(
        torch.is_grad_enabled() and x.requires_grad
    )


def compare(rows: list[list[int]], names: tuple[str, ...]) -> None:
    """Refuse numbers, a row from each process, that differ in a column."""
    for index, name in enumerate(names):
        values = [int(row[index]) for row in rows]
        if len(set(values)) > 1:
            raise SyncError(_disagreement(name, values))


def pack(moments: Moments) -> Tensor:
    """Count, mean and m2 in one row."""
    return torch.cat([moments.count.reshape(1), moments.mean, moments.m2])


def least_count(counts: Tensor) -> Tensor:
    """The least of some groups' counts; of those that count anything, 0 if there are none."""
    counts = torch.where(counts > 0, counts, torch.inf)
    least = torch.cat([counts.flatten(), counts.new_full((1,), torch.inf)]).amin()
    return torch.where(least.isfinite(), least, 0.0)


def unpack(rows: Tensor) -> Moments:
    """Moments along a first axis, from rows of `pack`."""
    channels = (rows.shape[1] - 1) // 2
    return Moments(rows[:, 0], rows[:, 1 : channels + 1], rows[:, channels + 1 :])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sync: Synchronizer) -> Tensor:
        ctx.sync = sync
        return sync._gather(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Each process's output depends on what this one has sent.
        return ctx.sync.sum(gradient)[ctx.sync.rank], None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sync: Synchronizer) -> Tensor:
        ctx.sync = sync
        return sync._sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sync.sum(gradient), None


#: torch 2.13's name for it; that of before is deprecated there.
_all_gather: Any = getattr(
    distributed, "all_gather_single", getattr(distributed, "all_gather_into_tensor", None)
)


def _store() -> Any:
    # No public name exists for it.
    return distributed.distributed_c10d._get_default_store()


def _disagreement(name: str, values: list[int]) -> str:
    shown: list[Any] = list(values)
    if name == "dtype":
        shown = [
            str(DTYPES[value]).removeprefix("torch.") if value >= 0 else "another"
            for value in values
        ]
    if name == "gradient of the input":
        shown = ["wanted" if value else "not wanted" for value in values]
    if name == "virtual_batch_size":
        shown = [value or None for value in values]
    if name in ("renorm", "forward_together"):
        shown = ["yes" if value else "no" for value in values]
    if name in ("eps", "momentum"):
        shown = [_number(value) for value in values]
    listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(shown[:16]))
    return (
        f"expected the same {name} on all processes that share statistics, got {listed}"
        + (", …" if len(values) > 16 else "")
        + "; build the same model, and treat it alike, on every rank"
    )


def _bits(number: float | None) -> int:
    """A number, or None, as an integer that a message can carry."""
    return -1 if number is None else int.from_bytes(struct.pack(">d", number))


def _number(bits: int) -> float | None:
    return None if bits == -1 else struct.unpack(">d", bits.to_bytes(8))[0]
