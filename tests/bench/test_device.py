"""What a GPU asks of those who measure, as far as it can be seen without one."""

import types

import pytest
import torch

from batchnorm.bench import device
from batchnorm.bench.device import COLD, COVER, MOST_SETS, REPLAYED, REPLAYS, WARM, Rotation

#: An H100's.
L2 = 50 << 20


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(device, "l2_bytes", lambda _: L2)


@pytest.mark.parametrize("size", [1 << 20, 8 << 20, 100 << 20, 1 << 30])
def test_cold_tensors_fill_the_cache_several_times(h100, size):
    number = device.sets(COLD, size, "cuda")
    assert number >= 2
    assert number * size >= COVER * L2
    assert (number - 1) * size < COVER * L2 or number == 2


def test_what_cannot_be_had_is_not_measured(h100):
    assert device.sets(COLD, COVER * L2 // MOST_SETS, "cuda") == MOST_SETS
    assert device.sets(COLD, COVER * L2 // MOST_SETS - 1, "cuda") == 0  # only launches
    for state in (WARM, REPLAYED):
        assert device.sets(state, L2 // 8, "cuda") == 1
        assert device.sets(state, L2 // 8 + 1, "cuda") == 0
    for other in ("default", "no page faults", device.CHECKED, device.PROFILED):
        assert device.sets(other, 1 << 40, "cuda") == 1


def test_steps_take_turns_and_each_keeps_its_result_until_its_next():
    made = []

    class Result:
        alive = 0

        def __init__(self, name):
            made.append((name, Result.alive))
            Result.alive += 1

        def __del__(self):
            Result.alive -= 1

    call = Rotation([lambda name=name: Result(name) for name in "abc"])
    for _ in range(6):
        call()
    assert [name for name, _ in made] == list("bcabca")
    # The first three find what was made before them, the others all but their own last one.
    assert [alive for _, alive in made] == [0, 1, 2, 2, 2, 2]


def test_events_time_calls_that_the_gpu_is_kept_busy_for(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert device.stopwatch("cpu") is None
    timed = device.stopwatch("cuda")
    assert timed(lambda: log.append("call"), 3) == pytest.approx(6e-3)
    assert log == ["call", "record", "call", "call", "call", "record", "wait"]


def test_a_capture_on_the_cpu_is_so_many_calls():
    calls = []
    device.captured(lambda: calls.append(1), "cpu")()
    assert len(calls) == REPLAYS


def test_torchs_records_name_what_ran():
    x = torch.randn(8, 3)
    layer = torch.nn.BatchNorm1d(3)
    assert "aten::native_batch_norm" in device.operators(lambda: layer(x))
    found = {kernel["name"]: kernel for kernel in device.kernels(lambda: layer(x), "cpu")}
    assert found["aten::native_batch_norm"]["times"] == pytest.approx(1)
    assert found["aten::native_batch_norm"]["us"] > 0


def test_the_cache_is_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(L2_cache_size=L2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert device.l2_bytes("cuda") == L2
