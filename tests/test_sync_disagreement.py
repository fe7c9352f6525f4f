"""Shared statistics: a disagreement is told to every rank, and nothing has changed."""

import contextlib
import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import BatchNorm, BatchNormError, InputError, SyncError, forward_together
from sync_ranks import AT_ONCE, results_of, serve


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def disagreements(rank, world):
    """The message of each; every rank gets one, and nothing has changed."""
    f32, f64 = torch.float32, torch.float64
    other = bool(rank)
    results = {}

    def told(name, bn, x, mask=None):
        before = copy.deepcopy(bn.state_dict())
        with pytest.raises(BatchNormError) as caught:
            bn(x, mask)
        results[name] = type(caught.value).__name__, str(caught.value)
        for key, value in bn.state_dict().items():
            assert torch.equal(value, before[key])

    channels = 3 + rank
    told("channels", BatchNorm(channels, process_group="world"), torch.randn(4, channels))
    dtype = f64 if other else f32
    told("dtype", BatchNorm(3, process_group="world", dtype=dtype), torch.randn(4, 3, dtype=dtype))
    size = 2 if other else None
    told("ghost", BatchNorm(3, process_group="world", virtual_batch_size=size), torch.randn(4, 3))
    renorm = AT_ONCE if other else None
    told("renorm", BatchNorm(3, process_group="world", renorm=renorm), torch.randn(4, 3))
    told("eps", BatchNorm(3, 1e-3 if other else 1e-5, process_group="world"), torch.randn(4, 3))
    momentum = 0.25 if other else None
    told("momentum", BatchNorm(3, 1e-5, momentum, process_group="world"), torch.randn(4, 3))
    for later in (False, True):
        bn = BatchNorm(3, process_group="world")
        if later:
            bn(torch.randn(4, 3))
            told("dtype later", bn, torch.randn(4, 3, dtype=dtype))
        told(f"gradient, {later}", bn, torch.randn(4, 3, requires_grad=other))
    ghost = BatchNorm(3, process_group="world", virtual_batch_size=3)
    ghost(torch.randn(4, 3))
    counted = BatchNorm(3, process_group="world")
    counted(torch.randn(4, 3))
    if other:  # as if it had been in eval() for a while
        counted._sync.calls -= 1
    told("calls", counted, torch.randn(4, 3))
    told("dtype later, ghost", ghost, torch.randn(4, 3, dtype=dtype))
    told("one value", BatchNorm(3, process_group="world"), torch.randn(rank, 3))
    told("one in a group", ghost, torch.randn(2, 3))
    mask = torch.zeros(4, dtype=torch.bool)
    mask[0] = other
    told("masked", BatchNorm(3, process_group="world"), torch.randn(4, 3), mask)

    bn, x = BatchNorm(3, process_group="world"), torch.randn(4, 3, requires_grad=True)
    with torch.set_grad_enabled(other):
        told("gradient mode", bn, x)
    network_of_one = nn.Sequential(BatchNorm(3, process_group="world"))
    together = functools.partial(forward_together, network_of_one)
    run, given = (together, [x]) if other else (network_of_one, x)
    with pytest.raises(SyncError, match="same forward_together"):
        run(given)

    # Who is watched computes otherwise, and sends the same.
    y = bn(x).sin().sum()
    with Watched() if other else contextlib.nullcontext():
        y.backward()

    bn = BatchNorm(3, process_group="world")
    bn(torch.randn(0, 3))  # empty everywhere: no step
    assert bn.num_batches_tracked == 0
    bn(torch.randn(4, 3), torch.full((4,), other))  # all masked here: a step
    assert bn.num_batches_tracked == 1
    return results


def test_disagreement_is_told_to_every_rank(tmp_path):
    ranks = results_of(__file__, tmp_path, 2, "disagreements")
    names = {
        "channels": "same number of channels .* rank 0: 3, rank 1: 4",
        "dtype": "same dtype .* rank 0: float32, rank 1: float64",
        "ghost": "same virtual_batch_size .* rank 0: None, rank 1: 2",
        "renorm": "same renorm .* rank 0: no, rank 1: yes",
        "eps": "same eps .* rank 0: 1e-05, rank 1: 0.001",
        "momentum": "same momentum .* rank 0: None, rank 1: 0.25",
        "gradient, False": "same gradient of the input .* rank 0: not wanted, rank 1: wanted",
        "gradient, True": "same gradient of the input",
        "gradient mode": "same gradient of the input",
        "dtype later": "same dtype",
        "calls": "same number of calls .* rank 0: 2, rank 1: 1",
        "dtype later, ghost": "same dtype",
        "one value": "more than 1 value per channel .* statistics that batches share",
        "one in a group": "each group of virtual_batch_size .* in a group of all",
        "masked": "more than 1 value per channel .* statistics that batches share",
    }
    for rank in ranks:
        assert rank.keys() == names.keys()
        for name, pattern in names.items():
            kind, message = rank[name]
            wanted = InputError if name in ("one value", "one in a group", "masked") else SyncError
            assert kind == wanted.__name__
            assert message.startswith("BatchNorm(")
            assert re.search(pattern, message), message


if __name__ == "__main__":
    serve(disagreements)
