"""Steps by the Triton kernels against the oracle: ways to cut and lay tensors, bounds on errors.

Where an error comes from, with u = 2⁻²⁴, the unit roundoff of float32:

sums
    A thread adds its elements of a load, and what those of each tile of its program come to, in
    float32; the rest is float64. For the sizes here a sum is wrong by at most `SUMS`·u of the sum
    of its terms' magnitudes.
statistics
    So the mean is wrong by SUMS·u·σ, whatever the offset, since it is summed from a pivot near it;
    and m2 by SUMS·u of itself and of what cancels, n·(pivot − mean)². The pivot is the mean of t of
    the n elements, so that is n/t times m2 at most, for data that were made to be hostile.
elements
    ((x − mean) − rest)·scale + shift has 6 roundings and the residual and the slope one each; the
    gradient dz − (Σdz + x̂·Σdz·x̂)/n has 8. The errors of sums and statistics come in beside.

In the interpreter bfloat16 is cut off rather than rounded: one u more of what is stored so.
"""

from dataclasses import replace

import numpy as np
import torch

import oracle
from batchnorm import batch_norm
from batchnorm.kernels import triton
from batchnorm.kernels.triton import operand, plans

DEVICE = "cuda" if torch.cuda.is_available() and not triton.INTERPRETED else "cpu"
EPS = 1e-5
SUMS = 8
ELEMENT = 8

#: Tiny tiles, of 32 or 64 elements, so that tiny tensors have several along each axis, the last
#: ones ragged; parts are merged four at a time.
TINY = {
    "WHOLE": 0,
    "WARPS": 1,
    "LOADS": 1,
    "PER_THREAD": 4,
    "LINE": 16,
    "SECTOR": 8,
    "OVERHEAD": 0,
    "FOLDED": 2**10,
    "PARTS": 4,
    "MERGED_PARTS": 4,
}

#: Ways to cut: how many tiles make a program, whether indices within a tile take 64 bits.
CUTS = {
    "whole": {},
    "whole, wide": {"wide": True},
    "folded": {"FOLD": 2**20, **TINY},
    "folded, of 3 tiles, wide": {"FOLD": 2**20, "per_split": 3, "wide": True, **TINY},
    "finished": {"FOLD": 0, "per_split": 2, **TINY},
}

#: Those of them that take all paths.
PATHS = ["whole", "folded, of 3 tiles, wide", "finished"]


def cut(monkeypatch, per_split=None, wide=None, **constants):
    """Have tensors cut by other constants, or for other programs."""
    for name, value in constants.items():
        monkeypatch.setattr(plans, name, value)

    def plan(*sizes):
        made = plans.plan.__wrapped__(*sizes)
        if wide is not None:
            made = replace(made, wide=wide)
        if per_split is not None and not made.whole:
            made = replace(made, per_split=per_split, splits=-(-made.tiles // per_split))
        return made

    monkeypatch.setattr(operand, "plan", plan)


LAYOUTS = ["contiguous", "channels_last", "reversed", "gaps", "expanded"]


def lay(x, layout, channel_dim=1):
    """The same values, differently in memory."""
    if layout == "reversed":
        axes = tuple(range(x.dim()))[::-1]
        return x.permute(axes).contiguous().permute(axes)
    if layout == "channels_last":
        return x.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)
    if layout == "gaps":
        return torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


def normal(*shape, dtype=torch.float32):
    """Random numbers on the device; the same ones on every device."""
    return torch.randn(shape).to(DEVICE, dtype)


def counts(shape, channel_dim=1, kind=torch.bool):
    """A random mask for x of this shape, or weights, of which two elements at least count."""
    rest = [size for axis, size in enumerate(shape) if axis != channel_dim % len(shape)]
    mask = torch.rand(rest) > 0.4
    mask.view(-1)[-2:] = True
    if kind is not torch.bool:
        mask = mask * (torch.rand(rest) * 2 + 0.5)
    return mask.to(DEVICE, kind)


def roundoff(dtype, stored=True):
    """Of a dtype; of what the kernels store as one."""
    truncates = stored and triton.INTERPRETED and dtype is torch.bfloat16
    return torch.finfo(dtype).eps / (1 if truncates else 2)


def served(y):
    """Whether the Triton kernels have made this, and will make its gradient."""
    return y.grad_fn.name() == "KernelFunctionBackward"


def wanted(dy, x, residual, mask, weight, bias, options):
    """A group's results by the oracle, and the magnitude of what each is the sum of."""
    options = {**options, "residual": residual, "mask": mask}
    eps, channel_dim = options["eps"], options["channel_dim"]
    channels = x.shape[channel_dim]
    f = oracle.forward(x, weight, bias, **options)
    dx, d_weight, d_bias, dz = oracle.backward(dy, x, weight, bias, **options)
    column = lambda v: oracle.wide(v)[:, None]  # noqa: E731
    up = lambda rows: oracle.unrows(rows, x.shape, channel_dim)  # noqa: E731
    gamma = torch.ones(channels) if weight is None else weight
    beta = torch.zeros(channels) if bias is None else bias
    s = 1 / (f.var + eps) ** 0.5
    added = 0 if residual is None else oracle.rows(abs(oracle.wide(residual)), channel_dim)
    y_size = up(abs(column(gamma)) * (abs(f.x_hat) + 1) + abs(column(beta)) + added)
    flow = oracle.rows(abs(oracle.wide(dz)), channel_dim)
    lean, tilt = flow.sum(1), (flow * (abs(f.x_hat) + 1)).sum(1)
    training = options["given"] is None
    pull = f.weights / f.count * (column(lean) + abs(f.x_hat) * column(tilt)) * training
    dx_size = up(abs(column(gamma)) * column(s) * (flow + pull))
    return {
        "y": (f.y, y_size),
        "dx": (dx, dx_size),
        "dz": (dz, abs(dz)),
        "d_weight": (d_weight, tilt),
        "d_bias": (d_bias, lean),
    }


def together(of_groups, name, joined):
    """A result of all groups and its magnitude, concatenated or summed."""
    return [joined([group[name][k] for group in of_groups]) for k in range(2)]


def check(
    x,
    *,
    dy=None,
    channel_dim=1,
    mask=None,
    residual=None,
    activation=None,
    training=True,
    momentum=0.1,
    parameters=torch.float32,
    affine=(True, True),
    kept=torch.float32,
    hostile=1,
    eps=EPS,
    size=None,
):
    """One step, forward and backward, against the oracle; the errors in parts of their bounds.

    With a size, in groups of so many samples.
    """
    channels = x.shape[channel_dim]
    weight, bias = (normal(channels, dtype=parameters) if there else None for there in affine)
    buffers = normal(channels, dtype=kept), normal(channels, dtype=kept).square() + 0.5
    old = tuple(b.clone() for b in buffers)
    stored = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dy = normal(*x.shape, dtype=stored) if dy is None else dy
    inputs = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    options = {"mask": mask, "activation": activation, "channel_dim": channel_dim, "eps": eps}
    y = batch_norm(
        leaves["x"], *buffers, leaves.get("weight"), leaves.get("bias"), training, momentum,
        residual=leaves.get("residual"), virtual_batch_size=size, **options,
    )  # fmt: skip
    assert served(y)
    assert y.dtype is stored
    assert y.shape == x.shape
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

    options["given"] = None if training else old
    here = [slice(None)]  # an axis of channels may be the first, and has no groups
    if size is not None:
        here = [slice(at, at + size) for at in range(0, len(x), size)]
    of_groups = [
        wanted(
            *(None if t is None else t[k] for t in (dy, x, residual, mask)), weight, bias, options
        )
        for k in here
    ]
    y_want, dx_want, dz_want = (together(of_groups, k, np.concatenate) for k in ("y", "dx", "dz"))
    d_weight, d_bias = (together(of_groups, k, sum) for k in ("d_weight", "d_bias"))
    f = oracle.forward(x, weight, bias, residual=residual, **options)
    sums = SUMS * hostile
    ratios = {}

    def within(name, got, want, roundings, size, wide=0):
        info = torch.finfo(got.dtype)
        bound = 1.01 * roundoff(got.dtype) * abs(want) + roundings * 2.0**-24 * size
        bound = bound + 2.0**-51 * wide
        bound = bound + float(info.smallest_normal) * info.eps
        error = abs(oracle.wide(got) - want)
        ratios[name] = float((error / bound).max())
        assert (error <= bound).all(), f"{name}: {ratios[name]:.3g} times the bound"

    within("y", y, y_want[0], ELEMENT + training * sums, y_want[1])
    within("dx", grads["x"], dx_want[0], ELEMENT + sums, dx_want[1])
    if weight is not None:
        within("d_weight", grads["weight"], d_weight[0], ELEMENT + sums, d_weight[1])
    if bias is not None:
        within("d_bias", grads["bias"], d_bias[0], ELEMENT + sums, d_bias[1])
    if residual is not None:
        within("d_residual", grads["residual"], dz_want[0], 1, dz_want[1])
    want = oracle.running(*old, f, momentum) if training else map(oracle.wide, old)
    sizes = momentum * f.var**0.5, momentum * f.unbiased
    for name, got, new, size, before, of_batch in zip(
        ("mean", "var"), buffers, want, sizes, old, (f.mean, f.unbiased), strict=True
    ):
        terms = abs(oracle.wide(before)) + abs(of_batch)
        within(f"running {name}", got, new, training * sums, size, training * terms)
    return ratios
