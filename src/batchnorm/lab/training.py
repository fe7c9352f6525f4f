"""Training and testing, as experiments share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.errors import InputError
from batchnorm.lab.data import Dataset

#: Added to a run's seed for the order of its batches: those draws must not repeat the weights'.
ORDER_OFFSET = 2_000_000_000

#: Test rows at a time.
ROWS = 1000


def tensors(data: Dataset, *, images: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and classes, test inputs and classes; rows flat, or images with channels.

    Raises:
        InputError: Images are wanted, and the data has none.
    """
    if images and data.x_train.ndim not in (3, 4):
        raise InputError(
            f"{data.name}: expected images, of (height, width) or (channels, height, width), for a "
            f"convolutional network; got rows of shape {data.x_train.shape[1:]}. Give it images."
        )
    parts = []
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        rows = torch.tensor(x)
        if not images:
            rows = rows.flatten(1)
        elif rows.dim() == 3:
            rows = rows[:, None]
        parts += [rows, torch.tensor(y)]
    x_train, y_train, x_test, y_test = parts
    return x_train, y_train, x_test, y_test


def generator(seed: int) -> torch.Generator:
    """Of weights."""
    return torch.Generator().manual_seed(seed)


def draw(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return the row numbers of one batch, no row twice; InputError if there are too few."""
    _suffice(rows, size)
    return torch.randperm(rows, generator=generator)[:size]


def batches(rows: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the row numbers of each batch for ever: a new order every epoch, full batches only.

    Raises:
        InputError: There are fewer rows than one batch needs.
    """
    _suffice(rows, size)
    order = torch.Generator().manual_seed(ORDER_OFFSET + seed)
    full = rows - rows % size
    while True:
        yield from torch.randperm(rows, generator=order)[:full].split(size)


def _suffice(rows: int, size: int) -> None:
    if rows < size:
        raise InputError(
            f"Expected at least {size} training rows, which make one batch; got {rows}. Give it "
            "more data."
        )


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    rate: float,
    steps: int,
    batch: int,
    seed: int,
    momentum: float = 0.9,
    decay: bool = True,
    arrange: Callable[[Tensor], Tensor] | None = None,
    clip: float = math.inf,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """Train by SGD on the cross-entropy; return the losses.

    Args:
        net: is left in training.
        x: training inputs.
        y: their classes.
        rate: learning rate at the start.
        steps: how many.
        batch: rows in each.
        seed: of the order of rows.
        momentum: of SGD.
        decay: the rate falls to zero by a cosine; else it stays.
        arrange: puts the row numbers of each batch in another order.
        clip: longer gradients, over all parameters together, are cut to this norm.
        after: is called with the number of steps done; it may look at the network, or change it.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=momentum)
    losses = []
    net.train()
    for step, rows in zip(range(steps), batches(len(x), batch, seed), strict=False):
        if decay:
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = rows if arrange is None else arrange(rows)
        optimizer.zero_grad()
        loss = cross_entropy(net(x[chosen]), y[chosen])
        loss.backward()
        if clip < math.inf:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        if after is not None:
            after(step + 1)
    return losses


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows in near-equal parts of at most `ROWS`, so that none is a single row left over.

    >>> [len(part) for part in chunks(torch.zeros(2001, 1))]
    [667, 667, 667]
    """
    return x.tensor_split(math.ceil(len(x) / ROWS))


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows that are classified right, in evaluation; modes are as before afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            right = sum(
                int((net(part).argmax(1) == labels).sum())
                for part, labels in zip(x.split(ROWS), y.split(ROWS), strict=True)
            )
    finally:
        for module, training in modes:
            module.training = training
    return right / len(y)


def saved_bytes(net: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `run()` returns.

    The network's own parameters and buffers are there in any case, and do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # By storage: what is kept may be a view, and two of what is kept may be one tensor.
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())
