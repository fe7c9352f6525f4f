"""Batch Renormalization: what is refused, not finite or empty, and what that leaves unchanged."""

import copy
import math

import pytest
import torch

from batchnorm import (
    ArgumentError,
    BatchNorm,
    NonFiniteWarning,
    Renorm,
    batch_norm,
    batch_norm_pure,
)
from renorm_limits import AT_ONCE, state

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(
    "wrong",
    [
        {"r_max": 0.99},
        {"r_max": math.nan},
        {"r_max": math.inf},
        {"r_max": "3"},
        {"r_max": torch.tensor(3.0)},
        {"d_max": -1e-9},
        {"d_max": math.nan},
        {"d_max": math.inf},
        {"d_max": None},
        {"r_steps": (2, 1)},
        {"r_steps": (-1, 1)},
        {"r_steps": (1, 2, 3)},
        {"r_steps": (0.5, 1)},
        {"d_steps": 5},
        {"d_steps": [0, 1]},
        {"d_steps": (2, 1)},
    ],
    ids=str,
)
def test_impossible_limits_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=f"expected {name} to be"):
        Renorm(**wrong)


def test_without_running_statistics_it_is_refused():
    with pytest.raises(ArgumentError, match="track_running_stats=True with renorm"):
        BatchNorm(3, track_running_stats=False, renorm=Renorm())
    for call in (batch_norm, batch_norm_pure):
        with pytest.raises(ArgumentError, match="running statistics with renorm"):
            call(torch.randn(6, 3), None, None, training=True, renorm=Renorm())
    for wrong in (3.0, (3, 5), Renorm):
        with pytest.raises(ArgumentError, match="None or a Renorm"):
            BatchNorm(3, renorm=wrong)
        with pytest.raises(ArgumentError, match="None or a Renorm"):
            batch_norm(torch.randn(6, 3), *state(), training=True, renorm=wrong)


def test_what_raises_afterwards_has_changed_nothing():
    def fails(y):
        raise ValueError

    bn = BatchNorm(3, activation=fails, renorm=Renorm(**AT_ONCE))
    with pytest.raises(ValueError):  # noqa: PT011
        bn(torch.randn(6, 3))
    assert bn.num_batches_tracked == 0
    assert torch.equal(bn.running_mean, torch.zeros(3))


def test_an_empty_batch_is_no_batch():
    bn = BatchNorm(3, renorm=Renorm(**AT_ONCE))
    bn(torch.randn(6, 3) + 4)
    before = copy.deepcopy(bn.state_dict())
    assert bn(torch.randn(0, 3, 4)).shape == (0, 3, 4)
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)


def test_nan_stays_in_its_channel():
    x = torch.randn(6, 3, 4) * 2 + 1
    bad = x.clone()
    bad[2, 1, 3] = torch.nan
    bn, clean = (BatchNorm(3, renorm=Renorm(**AT_ONCE)) for _ in range(2))
    with pytest.warns(NonFiniteWarning, match=r"1 of 3 channels \(1\)"):
        y = bn(bad)
    assert y[:, 1].isnan().all()
    assert torch.equal(y[:, [0, 2]], clean(x)[:, [0, 2]])
    assert bn.running_var[1] == 1
    assert torch.equal(bn.running_var[[0, 2]], clean.running_var[[0, 2]])
