"""Whether a folded model is the same function: or `FoldError`.

Three comparisons, of which the first two do not depend on luck:

1. *In float64, on several inputs*: the example; noise like it; its first sample alone; where Python
   code decides the way, its negative and larger ones, too. Folding is exact but for rounding, so
   that two models that are the same function agree to many digits.
2. *Of a twin*, in float64: the same model with other statistics, γ, β and constant parameters,
   folded by the same plan. In a new model means and β are 0 and γ and variances are 1: a fold that
   forgets one of them would not show. Nor does any mistake in front of weights that are 0.
3. *In the model's own dtype*: the folded model, as it is handed out, may round as badly as the
   model did before, and not much worse.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import FoldError
from batchnorm.tools.folding.example import Example, is_real
from batchnorm.tools.folding.rewrite import rewrite
from batchnorm.tools.folding.steps import Step

#: Greatest difference allowed in float64, as a part of the greatest output. Of a network that loses
#: in float32 (unit 6e-8) all but the first digit, the rounding grows 2 million times: in float64
#: (unit 1e-16), to 2e-10. The smallest mistake there is, an eps of 1e-3 in place of 1e-5 at a
#: variance of 1, makes 5e-4.
FLOAT64 = 1e-9

#: Some networks amplify rounding even more, as by many layers whose variance is far below eps. So
#: before one is refused, each of its numbers is moved by this much, 10⁶ units; folding rounds each
#: by a unit in no more than some 10³ operations, and may move the output by 10⁻³ of what that did.
#: The limit stays far below any mistake.
MOVED = 1e-10
SHARE = 1e-3
AT_MOST = 1e-6

#: How much worse than the model the folded one may round; and by how many units of its dtype where
#: the model itself is exact to a few. Of 400 networks at random (1 to 16 layers, 1 to 64 channels,
#: three dtypes, batch norm before and after, means far from 0) 397 were at most 5.7 times as bad,
#: and 7.9 units off where the model itself was within 4. Three had channels that were constant but
#: for rounding, which the model subtracts exactly: one was 39 times as bad.
WORSE = 16
UNITS = 32

#: Without float64 to compare with: of a network that loses three digits in float32.
UNITS_ALONE = 1000
#: In half precision that would be everything: such a limit finds no mistake.
COARSE = 0.01

OWN = "its own dtype"


@dataclass(frozen=True)
class Errors:
    """What `FoldReport` says of them."""

    error64: float | None
    error: float
    original_error: float
    notes: tuple[str, ...]


def verify(
    model: nn.Module, steps: Sequence[Step], example: Example, *, other_ways: bool = False
) -> Errors:
    """Compare a model in evaluation with its folded form.

    Args:
        model: as it was captured.
        steps: of the plan.
        example: inputs.
        other_ways: other inputs may lead Python code in the model other ways.

    Raises:
        FoldError: they are not the same function; it says where and by how much. Or there is
            nothing to compare.
    """
    own = example.run(copy.deepcopy(model))
    if not any(map(is_real, own)):
        raise FoldError(
            "expected a model that puts out floating tensors, got none: nothing could be verified"
        )
    if steps and not any(is_real(one) and bool(one.isfinite().any()) for one in own):
        raise FoldError(
            "expected example inputs of which the model makes finite numbers, got none: nothing "
            "could be verified; is the example empty, or not finite?"
        )
    unit = _unit(model, example)
    folded = _run(rewrite(copy.deepcopy(model), steps), example)
    try:  # not every device has float64, and not every model takes it
        wide, wide_example = copy.deepcopy(model).double(), example.map(Tensor.double)
        truth = wide_example.run(copy.deepcopy(wide))
    except Exception as error:
        note = f"not verified in float64, in which the model does not run: {_first_line(error)}"
        limit = UNITS_ALONE * unit
        if limit > COARSE:
            raise FoldError(f"expected a model that can be verified; {note}") from error
        _same_function(model, steps, example, limit, other_ways)
        return Errors(None, _compare(own, folded, limit, OWN), 0.0, (note,))
    error64 = _same_function(wide, steps, wide_example, FLOAT64, other_ways)
    if unit == torch.finfo(torch.float64).eps:
        return Errors(error64, error64, 0.0, ())
    original = max(map(_difference, truth, own))
    limit = WORSE * original + UNITS * unit
    return Errors(error64, _compare(truth, folded, limit, OWN), original, ())


def _same_function(
    model: nn.Module, steps: Sequence[Step], example: Example, limit: float, other_ways: bool
) -> float:
    """The greatest difference over several inputs, of the model and of a twin."""
    generator = torch.Generator().manual_seed(0)
    examples = {
        "the example": example,
        "noise like it": example.map(lambda x: _like(x, generator)),
        "its first sample": example.map(lambda x: x[:1] if x.dim() else x),
    }
    if other_ways:
        examples |= {
            "its negative": example.map(Tensor.neg),
            "twice its samples": example.map(_more),
            "larger inputs": example.map(_larger),
        }
    worst = 0.0
    for one in (model, _twin(model, steps, generator)):
        what = "itself" if one is model else "a twin with other statistics and parameters"
        for which, inputs in examples.items():
            try:
                expected = inputs.run(copy.deepcopy(one))
            except Exception:  # not every model takes other inputs than the example
                if inputs is example:
                    raise
                continue
            rounding = partial(_moves, one, inputs)
            got = _run(rewrite(copy.deepcopy(one), steps), inputs)
            worst = max(worst, _compare(expected, got, limit, f"{what} on {which}", rounding))
    return worst


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    try:
        return example.run(model)
    except Exception as error:
        raise FoldError(
            "expected the folded model to run as the model does, got "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _compare(
    expected: list[Tensor],
    got: list[Tensor],
    limit: float,
    what: str,
    rounding: Callable[[], float] = lambda: 0.0,
) -> float:
    """The greatest difference between outputs, within a limit, or what rounding may explain.

    Raises:
        FoldError: it is above the limit.
    """
    if len(expected) != len(got):
        raise FoldError(f"expected {len(expected)} tensors of the folded model, got {len(got)}")
    worst = 0.0
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        difference = _difference(one, other)
        if limit < difference < AT_MOST:
            limit = max(limit, min(AT_MOST, rounding()))
        if not difference <= limit:
            raise FoldError(
                f"expected the folded model to put out what the model does, got output {index} in "
                f"{what} with an error of {difference:.1e} of its greatest value, where rounding "
                f"explains {limit:.1e}; please report the model, and fold parts of it"
            )
        worst = max(worst, difference)
    return worst


def _moves(model: nn.Module, example: Example) -> float:
    """How far rounding in float64 may move a model's output; 0 in any other dtype."""
    if any(parameter.dtype is not torch.float64 for parameter in model.parameters()):
        return 0.0
    generator = torch.Generator().manual_seed(1)

    def moved(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor * (1 + MOVED * noise.to(tensor.device))

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(moved(parameter))
    before, after = example.run(copy.deepcopy(model)), example.map(moved).run(other)
    return SHARE * max(map(_difference, before, after))


def _difference(expected: Tensor, got: Tensor) -> float:
    """Greatest difference as a part of the greatest finite value; infinity for another shape."""
    if expected.shape != got.shape:
        return math.inf
    if not is_real(expected):
        # Indices follow from what is compared elsewhere, and ties may fall either way.
        return 0.0
    wide, other = expected.cpu().double(), got.cpu().double()
    finite = wide.isfinite()
    if not torch.equal(finite, other.isfinite()) or not torch.equal(
        wide[~finite].nan_to_num(), other[~finite].nan_to_num()
    ):
        return math.inf
    wide, other = wide[finite], other[finite]
    if not wide.numel():
        return 0.0
    scale = float(wide.abs().max())
    return float((wide - other).abs().max()) / (scale or 1.0)


def _like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise with the mean and the deviation of a tensor; 1 for one without, as of zeros."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if x.numel() < 2:
        return x + noise
    deviation = x.std()
    return noise * torch.where(deviation == 0, 1.0, deviation) + x.mean()


def _more(x: Tensor) -> Tensor:
    """Twice as many samples."""
    return torch.cat([x, x]) if x.dim() else x


def _larger(x: Tensor) -> Tensor:
    """Twice as large along the last two axes, if they are of places: four times the work."""
    places = min(max(x.dim() - 2, 0), 2)
    return x.repeat((1,) * (x.dim() - places) + (2,) * places)


@torch.no_grad()
def _twin(model: nn.Module, steps: Sequence[Step], generator: torch.Generator) -> nn.Module:
    """The model with other numbers, of the same sizes, wherever a new model has 0 or 1."""
    twin = copy.deepcopy(model)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    for parameter in twin.parameters():
        if is_real(parameter) and parameter.numel() and bool((parameter == parameter.max()).all()):
            parameter.add_(noise(parameter), alpha=0.3)
    unshifted: set[str] = set()
    for step in reversed(steps):  # what was folded into a layer before that was
        if step.unshifted or step.into in unshifted:
            unshifted.add(step.layer)
    for name, layer in twin.named_modules():
        mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
        if not isinstance(layer, _BatchNorm) or mean is None or var is None:
            continue
        var.mul_(torch.exp2(noise(var).clamp(-1, 1)))
        mean.add_(noise(mean) * var.sqrt(), alpha=0.5)
        if layer.bias is not None:
            layer.bias.add_(noise(layer.bias), alpha=0.5)
        if name in unshifted:
            mean.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
    return twin


def _unit(model: nn.Module, example: Example) -> float:
    """The rounding unit of the least precise dtype that is in use."""
    every = [*model.parameters(), *model.buffers(), *example.tensors()]
    return max((torch.finfo(t.dtype).eps for t in every if is_real(t)), default=0.0)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
