import pytest

from batchnorm.bench import load
from batchnorm.bench.load import Used


def test_what_is_used_is_read_from_the_system(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    # user nice system idle iowait irq softirq steal guest guest_nice; user has the guests in it.
    stat.write_text("cpu  100 20 30 800 50 6 4 40 90 9\ncpu0 1 2 3 4\n")
    monkeypatch.setattr(load.os, "sysconf", lambda name: 100)
    used = Used.now(stat)
    assert (used.busy, used.total) == pytest.approx((2.0, 10.5))
    assert used.own > 0
    assert Used.now(tmp_path / "nothing") is None
    stat.write_text("intr 1 2\n")
    assert Used.now(stat) is None


def test_others_have_what_is_not_ours():
    start = Used(total=100.0, busy=50.0, own=10.0)
    assert start.others(Used(total=104.0, busy=53.0, own=12.0)) == 0.25
    assert start.others(Used(total=104.0, busy=52.0, own=12.1)) == 0.0
    assert start.others(start) is None
    assert start.others(None) is None


def test_work_of_ones_own_is_not_that_of_others():
    import time

    start = Used.now()
    if start is None:
        pytest.skip("the system does not tell")
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    later = Used.now()
    assert later.own - start.own > 0.1
    assert later.total > start.total


def test_an_unknown_load_is_not_called_busy():
    assert not load.busy(None)
    assert not load.busy(load.BUSY)
    assert load.busy(0.2)
