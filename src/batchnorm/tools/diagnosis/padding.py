"""Finding padding among what comes into a layer: positions that are the same in many samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import Moments

#: A position counts as padding from so many samples on that have the very same values there.
ALIKE = 2

#: And there must be so many times as many of them as of those that share any other values: content
#: repeats, too, but not one piece of it so much more than the next.
LEAD = 5

#: How much of the rest of a sequence may be like its padding: where most of it is, nothing happens
#: there. Some may be padding that was not told from what ends sequences.
LIKE_REST = 0.2

#: Rows of a dense batch that are one and the same: a share of the batch; how many other kinds of
#: rows there must be, so that it is no category; and how many of the other rows may have the same
#: value in a channel, of which at least one must tell. Zeros behind a ReLU are in all rows.
ROWS_SHARE, ROWS_KINDS, ROWS_SHARING = 0.05, 8, 0.05


@dataclass(frozen=True)
class Padding:
    """What looks like padding in a batch.

    Attributes:
        share: of all positions.
        lengths: how many different lengths of padding there are; 0 for dense batches.
        mean_shift: root mean square over channels of (mean with padding − mean without) / σ
            without.
        var_ratio: geometric mean over channels of variance with / variance without.
    """

    share: float
    lengths: int
    mean_shift: float
    var_ratio: float


def padding_in(x: Tensor, axis: int) -> Padding | None:
    """Padding in sequences (N, C, L), or among the rows of (N, C); images are not looked at.

    Their borders are often all of one colour, and belong to them.
    """
    if x.dim() == 2 and axis == 1:
        real = _unlike_rows(x)
        lengths = 0
    elif x.dim() == 3 and axis > 0:
        real, lengths = _before_padding(x.movedim(axis, 2))
        x = x.movedim(axis, 1)
    else:
        return None
    if bool(real.all()) or int(real.sum()) < ALIKE:
        return None
    whole, without = Moments.of(x), Moments.of(x, real)
    var, var_without = whole.variance(), without.variance()
    varies = var_without > 0
    if not bool(varies.any()):
        return None
    shift = (whole.mean - without.mean)[varies].square() / var_without[varies]
    ratio = (var[varies] / var_without[varies]).clamp(min=1e-12).log().mean().exp()
    share = 1 - float(real.double().mean())
    return Padding(share, lengths, float(shift.mean().sqrt()), float(ratio))


def _before_padding(x: Tensor) -> tuple[Tensor, int]:
    """(N, L): what is not padding, of (N, L, C); and how many lengths of padding there are.

    Padding is at one end, and the same in all samples that have it, position by position. Content
    hardly ever is, but for a token that all sequences have in common: so sequences must differ in
    how much of it they have. Where both ends look like it, it is a border, silence, or nothing
    happening, and belongs to the content.
    """
    length = x.shape[1]
    order = torch.arange(length, device=x.device)
    first, last = _alike(x, range(length)), _alike(x, range(length - 1, -1, -1))
    lengths, end = (last, -1) if _differ(last) else (first, 0)
    real = order < length - last[:, None] if end else order >= first[:, None]
    padding = x[int(lengths.argmax()), end]
    if _differ(first) == _differ(last) or not bool(real.any()):
        return torch.ones_like(real), 0
    if float((x[real] == padding).all(1).double().mean()) > LIKE_REST:
        return torch.ones_like(real), 0
    return real, len(lengths.unique())


def _alike(x: Tensor, positions: range) -> Tensor:
    """(N,): for how many of the positions, from the first on, a sample is as most others are."""
    members = torch.arange(len(x), device=x.device)
    lengths = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for position in positions:
        _, kind, counts = x[members, position].unique(
            dim=0, return_inverse=True, return_counts=True
        )
        most, next_most = _two_most(counts)
        if most < max(ALIKE, LEAD * next_most):
            break
        members = members[kind == counts.argmax()]
        lengths[members] += 1
    return lengths


def _differ(lengths: Tensor) -> bool:
    """Whether samples have padding of different lengths, as what they have in common has not."""
    different = len(lengths.unique())
    some_have_none = bool((lengths == 0).any()) and int(lengths.max()) > 1
    return different > 2 or (different == 2 and some_have_none)


def _two_most(counts: Tensor) -> tuple[int, int]:
    top = [*counts.topk(min(2, len(counts))).values.tolist(), 0]
    return top[0], top[1]


def _unlike_rows(x: Tensor) -> Tensor:
    """(N,): all rows but the one that is there far more often than any other."""
    everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if x.shape[1] == 1:  # numbers of one kind, of which any may be frequent
        return everything
    _, kind, counts = x.unique(dim=0, return_inverse=True, return_counts=True)
    most, next_most = _two_most(counts)
    if most < max(ROWS_SHARE * len(x), LEAD * next_most) or len(counts) <= ROWS_KINDS:
        return everything
    real: Tensor = kind != counts.argmax()
    row = x[int((~real).nonzero()[0])]
    sharing = (x[real] == row).double().mean(0)
    return real if bool((sharing <= ROWS_SHARING).any()) else everything
