"""Batch Renormalization: a schedule opens the limits step by step."""

import pytest
import torch

from batchnorm import BatchNorm, Renorm, batch_norm
from renorm_limits import close

pytestmark = pytest.mark.usefixtures("kernels")


def test_limits_open_between_two_steps():
    renorm = Renorm(3.0, 5.0, r_steps=(10, 30), d_steps=(20, 40))
    for step, r_max, d_max in [
        (0, 1, 0), (10, 1, 0), (11, 1.1, 0), (20, 2, 0), (25, 2.5, 1.25), (30, 3, 2.5),
        (31, 3, 2.75), (39, 3, 4.75), (40, 3, 5), (41, 3, 5), (10**12, 3, 5),
    ]:  # fmt: skip
        got = renorm.limits(torch.tensor(step))
        assert [float(limit) for limit in got] == pytest.approx([r_max, d_max], rel=1e-15)
    assert renorm.limits(None) == (3.0, 5.0)


def test_limits_that_open_at_once():
    for first in (0, 7):
        renorm = Renorm(3.0, 5.0, r_steps=(first, first), d_steps=(first, first))
        if first:
            before = renorm.limits(torch.tensor(first - 1))
            assert [float(limit) for limit in before] == [1, 0]
        for step in (first, first + 1):
            assert [float(limit) for limit in renorm.limits(torch.tensor(step))] == [3, 5]


def test_defaults_are_the_papers():
    assert Renorm() == Renorm(3.0, 5.0, r_steps=(5_000, 40_000), d_steps=(5_000, 25_000))


def test_the_layers_steps_are_the_batches_before_this_one():
    """Limits by num_batches_tracked, in a loop with the function, which has them in full."""
    schedule = Renorm(3.0, 2.0, r_steps=(1, 4), d_steps=(2, 4))
    bn = BatchNorm(3, renorm=schedule).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for step in range(6):
        x = torch.randn(6, 3).double() * 5 + 4
        r_max = [1, 1, 1 + 2 / 3, 1 + 4 / 3, 3, 3][step]
        d_max = [0, 0, 0, 1, 2, 2][step]
        want = batch_norm(x, mean, var, training=True, renorm=Renorm(r_max, d_max))
        torch.testing.assert_close(bn(x), want, **close)
    # A loaded checkpoint goes on where it stopped; a reset begins anew.
    other = BatchNorm(3, renorm=schedule).double()
    other.load_state_dict(bn.state_dict())
    x = torch.randn(6, 3).double() * 5 + 4
    assert torch.equal(other(x), bn(x))
    bn.reset_running_stats()
    torch.testing.assert_close(bn(x), batch_norm(x, None, None, training=True), **close)
