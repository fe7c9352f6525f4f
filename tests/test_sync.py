"""Statistics shared by real processes: as if one of them had the batches of all."""

import pytest
import torch

import oracle
from batchnorm.kernels import native
from sync_ranks import OPTIONS, STEPS, close, data, layer, results_of, serve

#: Samples on each rank: even, uneven, with empty ranks, more ranks than fill a group of samples.
SIZES = {1: [[7]], 2: [[6, 2], [0, 5]], 3: [[5, 0, 3]], 4: [[2, 7, 1, 4]]}

MASKS = (None, "bool", "weights")
CASES = [(name, mask, torch.float64) for name in OPTIONS for mask in MASKS]
CASES += [(name, "bool", torch.float32) for name in ("plain", "ghost", "ghost, renorm")]


def steps(name, mask_kind, dtype, part, group, samples):
    """What some training steps give: per step y, gradients and second-order ones; buffers; eval."""
    bn = layer(name, dtype, group)
    results = []
    for step in range(STEPS):
        (x, residual, dy, ddx), masks = data(samples, bn.channel_dim, dtype, step)
        mask = masks[mask_kind]
        mask = None if mask is None else mask[part]
        x, residual = (t[part].clone().requires_grad_() for t in (x, residual))
        y = bn(x, mask, residual)
        inputs = [x, residual, *bn.parameters()]
        gradients = torch.autograd.grad(y, inputs, dy[part], retain_graph=True)
        (dx,) = torch.autograd.grad(y, [x], dy[part], create_graph=True)
        second = torch.autograd.grad(dx, [x], ddx[part])
        results.append([t.detach() for t in (y, *gradients, *second)])
    return results, [b.clone() for b in bn.buffers()], bn.eval()(x.detach()).detach()


def equality(rank, world):
    """Every case, with and without the C++ kernels."""
    results = {}
    for sizes in SIZES[world]:
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for case in CASES:
            for missing in {native.MISSING, "left out"}:
                native.MISSING, before = missing, native.MISSING
                results[tuple(sizes), case, missing] = steps(*case, part, "world", sum(sizes))
                native.MISSING = before
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_process_with_all_batches(tmp_path, world):
    ranks = results_of(__file__, tmp_path, world, "equality")
    for key in ranks[0]:
        sizes, case, missing = key
        dtype = case[2]
        whole, buffers, evaluated = steps(*case, slice(None), None, sum(sizes))
        for step, expected in enumerate(whole):
            parts = [rank[key][0][step] for rank in ranks]
            for index, theirs in enumerate(expected):
                ours = [part[index] for part in parts]
                # Those of γ and β are shares.
                shares = 3 <= index < len(expected) - 1
                ours = sum(ours) if shares else torch.cat(ours)
                close(ours, theirs, dtype, (key, step, index))
        for rank in ranks:
            for ours, theirs in zip(rank[key][1], buffers, strict=True):
                close(ours, theirs, dtype, (key, "buffers"))
        if sizes[-1]:
            close(ranks[-1][key][2], evaluated[-sizes[-1] :], dtype, (key, "eval"))
    for sizes in SIZES[world]:
        check_the_oracle(ranks, sizes)


def check_the_oracle(ranks, sizes):
    """The one process above is ours, too; so once against the truth."""
    (x, residual, dy, _), masks = data(sum(sizes), 1, torch.float64, 0)
    bn = layer("activation", torch.float64, None)
    options = {"mask": masks["weights"], "residual": residual, "activation": "leaky_relu"}
    expected = oracle.forward(x, bn.weight, bn.bias, **options)
    gradients = oracle.backward(dy, x, bn.weight, bn.bias, **options)
    key = tuple(sizes), ("activation", "weights", torch.float64), native.MISSING
    y, dx, dz, d_weight, d_bias, _ = zip(*(rank[key][0][0] for rank in ranks), strict=True)
    for ours, theirs in (
        (torch.cat(y), expected.y),
        (torch.cat(dx), gradients[0]),
        (torch.cat(dz), gradients[3]),
        (sum(d_weight), gradients[1]),
        (sum(d_bias), gradients[2]),
    ):
        close(ours, torch.from_numpy(theirs.astype("float64")), torch.float64, key)


if __name__ == "__main__":
    serve(equality)
