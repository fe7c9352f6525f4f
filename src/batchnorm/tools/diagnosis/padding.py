"""Finding padding among what comes into a layer: positions that are the same in many samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import Moments

#: A position counts as padding from so many samples on that have the very same values there.
ALIKE = 2

#: Rows of a dense batch that are one and the same: a share of the batch, and how many times as
#: often as the next most frequent row. Rows of categories repeat, too, but no single one so much.
ROWS_SHARE, ROWS_LEAD = 0.05, 5


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
    how much of it they have.
    """
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for positions in (range(x.shape[1] - 1, -1, -1), range(x.shape[1])):
        members = torch.arange(len(x), device=x.device)
        lengths = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for position in positions:
            _, kind, counts = x[members, position].unique(
                dim=0, return_inverse=True, return_counts=True
            )
            if int(counts.max()) < ALIKE:
                break
            members = members[kind == counts.argmax()]
            lengths[members] += 1
        different = len(lengths.unique())
        # The same end in all samples is not padding.
        if different > 2 or (
            different == 2 and bool((lengths == 0).any()) and int(lengths.max()) > 1
        ):
            reach = lengths[:, None]
            order = torch.arange(x.shape[1], device=x.device)[None]
            from_end = positions.step < 0
            real &= order < x.shape[1] - reach if from_end else order >= reach
            return real, different
    return real, 0


def _unlike_rows(x: Tensor) -> Tensor:
    """(N,): all rows but the one that is there far more often than any other."""
    _, kind, counts = x.unique(dim=0, return_inverse=True, return_counts=True)
    top = counts.topk(min(2, len(counts))).values
    first, second = int(top[0]), int(top[1]) if len(top) > 1 else 0
    if first < max(4, ROWS_SHARE * len(x)) or first < ROWS_LEAD * second or not second:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    real: Tensor = kind != counts.argmax()
    return real
