"""Shared statistics: a process that is not there is an error of the others, in time."""

import copy
import os
import time

import pytest
import torch

from batchnorm import BatchNorm, SyncError, sync_statistics
from sync_ranks import results_of, serve

TIMEOUT_S = 4


def absence(rank, world, how):
    """One process is not there: (seconds, message) of the other."""
    bn = BatchNorm(3, process_group="world")
    x = torch.randn(4, 3, requires_grad=True)
    y = bn(x)
    if how == "eval" and rank == 1:
        bn.eval()
    before = copy.deepcopy(bn.state_dict())
    if how == "dies before backward" and rank == 1:
        os._exit(7)
    if how != "dies before backward":
        y.sin().sum().backward()
    if how in ("dies before forward", "no sync_statistics") and rank == 1:
        os._exit(7)
    start = time.monotonic()

    def go_on():
        if how == "no sync_statistics":
            sync_statistics(bn)
        if how == "dies before backward":
            y.sin().sum().backward()
        while True:  # the rank in eval is told by what it does next
            bn(x).sin().sum().backward()
            time.sleep(0.1)

    with pytest.raises(SyncError) as caught:
        go_on()
    for key, value in bn.state_dict().items():
        assert torch.equal(value, before[key]) or how == "dies before backward"
    if rank == 0:
        time.sleep(3)  # it keeps the store, in which the other will look
    return time.monotonic() - start, str(caught.value)


HOW = ["dies before forward", "dies before backward", "eval", "no sync_statistics"]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_absence_is_an_error_within_the_time_out(tmp_path, how):
    statuses = [0, 0 if how == "eval" else 7]
    ranks = results_of(__file__, tmp_path, 2, "absence", how, statuses=statuses)
    assert len(ranks) == statuses.count(0)
    for seconds, message in ranks:
        assert seconds < 3 * TIMEOUT_S
        assert "expected all 2 processes" in message
        about_training = how != "no sync_statistics"
        assert ("eval()" in message) == about_training
        assert ("to call sync_statistics" in message) != about_training


if __name__ == "__main__":
    serve(absence, timeout_s=TIMEOUT_S, all_stay=False)
