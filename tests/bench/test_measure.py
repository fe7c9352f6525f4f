import contextlib
import gc
import itertools

import pytest

from batchnorm.bench import measure
from batchnorm.bench.estimate import ratios
from batchnorm.bench.measure import Times, rounds


class Machine:
    """A clock that only calls move, each by what it costs times how slow the machine is now."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        self.slow = lambda: 1.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def call():
            self.log.append(name)
            self.now += seconds * self.slow()

        return call


def test_a_machine_that_slows_down_for_whole_rounds_does_not_change_a_ratio(monkeypatch):
    machine = Machine(monkeypatch)
    calls = {"a": machine.call("a", 3e-3), "b": machine.call("b", 1e-3)}
    # To warm up, "a" is called once and "b" seven times; then one call of "a" and two of "b" make a
    # round, and each round is slower than the one before.
    machine.slow = lambda: 1.0 + max(0, len(machine.log) - 9) // 3
    times = rounds(calls, 9, seed=0)
    assert times["a"].seconds == pytest.approx([3e-3 * (1 + i) for i in range(9)])
    assert times["b"].us == pytest.approx(5e3)
    assert ratios(times["a"].seconds, times["b"].seconds) == pytest.approx([3.0] * 9)


def test_every_round_has_everyone_back_to_back_in_an_order_of_its_own(monkeypatch):
    machine = Machine(monkeypatch)
    names = ("a", "b", "c")
    # 0.5 ms: four calls make the 2 ms of a round.
    rounds({name: machine.call(name, 5e-4) for name in names}, 20, seed=3)
    blocks = [(name, len(list(group))) for name, group in itertools.groupby(machine.log[-240:])]
    orders = {tuple(machine.log[-240:][i : i + 12 : 4]) for i in range(0, 240, 12)}
    assert all(count % 4 == 0 for _, count in blocks)
    assert all(sorted(order) == list(names) for order in orders)
    assert len(orders) == 6


def test_a_long_call_is_made_once_a_round(monkeypatch):
    machine = Machine(monkeypatch)
    rounds({"long": machine.call("long", 0.1)}, 5, seed=0)
    assert len(machine.log) == 1 + 5


def test_rubbish_is_collected_again_afterwards_even_when_a_call_raises():
    seen = []
    rounds({"a": lambda: seen.append(gc.isenabled())}, 2, seed=0, loop_s=1e-9)
    assert gc.isenabled()
    assert not seen[-1]

    calls = iter(range(100))
    with pytest.raises(ZeroDivisionError):
        rounds({"a": lambda: 1 / (next(calls) < 6)}, 9, seed=0, loop_s=1e-9)
    assert gc.isenabled()


def test_another_stopwatch_times_the_calls(monkeypatch):
    machine = Machine(monkeypatch)
    asked = []

    def stopwatch(call, loops):
        asked.append(loops)
        for _ in range(loops):
            call()
        return 1e-3 * loops

    times = rounds({"a": machine.call("a", 1.0)}, 3, seed=0, stopwatch=stopwatch)
    assert asked == [1, 3, 3, 2, 2, 2]  # 2 ms a round, of 1 ms each
    assert times["a"].seconds == (1e-3, 1e-3, 1e-3)


def test_what_is_entered_around_the_calls_of_a_name_is_left_before_the_next():
    inside, seen = [], []

    @contextlib.contextmanager
    def around(name):
        inside.append(name)
        yield
        inside.remove(name)

    def call(name):
        return lambda: seen.append((name, list(inside)))

    rounds({name: call(name) for name in "ab"}, 4, seed=0, loop_s=1e-9, around=around)
    assert {name for name, _ in seen} == {"a", "b"}
    assert all(entered == [name] for name, entered in seen)
    assert inside == []


def test_the_median_of_times():
    assert Times((3e-6, 1e-6, 2e-6), (0.0, 0.0, 0.0)).us == pytest.approx(2.0)
