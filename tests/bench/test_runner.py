import json
import os
import platform
import sys

import pytest
import torch

from batchnorm.bench import runner, worker
from batchnorm.bench.environment import cache_bytes, environment
from batchnorm.bench.runner import ALLOCATORS, MeasuringError, allocators, child_environment
from batchnorm.bench.worker import Request
from batchnorm.errors import ArgumentError

REQUEST = Request("quick", "64x10 ", "cpu", 1, "no page faults", 0)

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def started(monkeypatch, code):
    """Let processes that measure run this code instead."""
    monkeypatch.setattr(worker, "command", lambda request: [sys.executable, "-c", code])


def test_the_measuring_process_really_has_the_allocators_environment(monkeypatch):
    started(monkeypatch, "import json, os; print(json.dumps({'event': 'env', **dict(os.environ)}))")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("KEPT", "yes")
    (event,) = runner.measured(REQUEST)
    assert {name: event[name] for name in SETTINGS} == SETTINGS
    assert event["KEPT"] == "yes"


def test_the_default_is_the_allocator_as_it_is():
    present = {**SETTINGS, "PATH": "/bin"}
    assert child_environment("default", present) == {
        "PATH": "/bin",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    assert ALLOCATORS["no page faults"] == SETTINGS


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_page_faults_are_gone_where_the_label_says_so(monkeypatch):
    code = """
import json, resource, torch
x = torch.ones(1 << 20)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x.clone()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20
faults()
print(json.dumps({"event": "faults", "faults": faults()}))
"""
    started(monkeypatch, code)
    (event,) = runner.measured(REQUEST)
    assert event["faults"] < 1


def test_other_allocators_than_glibcs_are_not_claimed_to_be_set(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert allocators("cpu") == ("default", "no page faults")
    assert allocators("cuda") == ("default",)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocators("cpu") == ("default",)


def test_a_process_that_dies_is_reported_with_its_last_words(monkeypatch):
    started(monkeypatch, "import sys; print('{\"event\": \"step\"}'); sys.exit('no more memory')")
    events = runner.measured(REQUEST)
    assert next(events) == {"event": "step"}
    with pytest.raises(MeasuringError, match=r"status 1\. Its last words: no more memory"):
        next(events)


def test_a_process_is_ended_with_those_who_wait_for_it(monkeypatch):
    code = """
import json, os, time
print(json.dumps({"pid": os.getpid()}), flush=True)
time.sleep(60)
"""
    started(monkeypatch, code)
    events = runner.measured(REQUEST)
    pid = next(events)["pid"]
    events.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_suite_is_measured_once_for_each_allocator_and_progress_is_told(monkeypatch):
    asked, told = [], []

    def measured(request):
        asked.append(request)
        yield {"event": "environment", "threads": 1}
        yield {"event": "step", "what": "this"}

    class Watcher(runner.Progress):
        def start(self, total):
            told.append(total)

        def step(self, what):
            told.append(what)

    monkeypatch.setattr(runner, "measured", measured)
    monkeypatch.setattr(runner, "allocators", lambda device: ("default", "no page faults"))
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0, 0))
    content = runner.run("quick", text="64x10 ", threads=3, progress=Watcher())
    assert [(r.suite, r.text, r.threads, r.allocator) for r in asked] == [
        ("quick", "64x10 ", 3, "default"),
        ("quick", "64x10 ", 3, "no page faults"),
    ]
    assert told == [18, "this, default", "this, no page faults"]
    assert "load 9.5" in content["notes"][0]


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="expected a CUDA device, found none"):
        runner.run("quick", device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "nope"}, "Expected one of: quick, full"),
        ({"device": "tpu"}, "Expected one of: cpu, cuda"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_started(monkeypatch, options, message):
    monkeypatch.setattr(runner, "measured", None)
    with pytest.raises(ArgumentError, match=message):
        runner.run(**options)


def test_the_environment_says_where_it_was_measured(tmp_path):
    found = environment("cpu", 5)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["seed"] == 5
    assert any(line.startswith("native: ") for line in found["backends"])
    assert found["date"].endswith("+00:00")
    json.dumps(found)
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(value + "\n")
    (tmp_path / "index3").mkdir()
    assert cache_bytes(tmp_path) == {"L1": 48 << 10, "L2": 1 << 20}
