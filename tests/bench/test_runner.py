import json
import os
import platform
import sys
import types
from pathlib import Path

import pytest
import torch

from batchnorm.bench import load, runner, worker
from batchnorm.bench.cases import SUITES
from batchnorm.bench.environment import cache_bytes, environment, huge_pages, nvidia_smi
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
    tunables = "glibc.malloc.top_pad=268435456"  # the same settings by their other names
    present = {**SETTINGS, "GLIBC_TUNABLES": tunables, "PATH": "/bin"}
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
    assert allocators("cuda") == ("cold L2", "warm L2")  # torch keeps the memory of a GPU
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


class Watcher(runner.Progress):
    def __init__(self):
        self.told, self.notes = [], []

    def start(self, suite, total, minutes):
        self.told.append((suite, total))
        self.minutes = minutes

    def step(self, what):
        self.told.append(what)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def watched(monkeypatch):
    """Runs that measure nothing, on a machine that is quiet until a test says otherwise."""
    monkeypatch.setattr(runner, "allocators", lambda device: ("default", "no page faults"))
    monkeypatch.setattr(load, "others", lambda seconds: 0.0)
    monkeypatch.setattr(load.Used, "now", lambda: None)
    return Watcher()


def measuring(asked):
    def measured(request):
        asked.append(request)
        yield {"event": "environment", "threads": 1}
        yield {"event": "step", "what": "this"}

    return measured


def test_processes_take_turns_over_the_allocators_and_progress_is_told(monkeypatch, watched):
    asked = []
    monkeypatch.setattr(runner, "measured", measuring(asked))
    content = runner.run("quick", text="64x10 ", threads=3, progress=watched)
    processes = SUITES["quick"].processes
    assert [(r.allocator, r.part) for r in asked] == [
        (name, part) for part in range(processes) for name in ("default", "no page faults")
    ]
    assert {(r.suite, r.text, r.threads, r.seed) for r in asked} == {("quick", "64x10 ", 3, 0)}
    first, *steps = watched.told
    assert first == ("quick", processes * 2 * 9)
    assert steps[:3] == [
        "this, default, process 1",
        "this, no page faults, process 1",
        "this, default, process 2",
    ]
    assert (watched.notes, content["notes"], content["complete"]) == ([], [], True)
    assert content["load"] == {"before": [0.0], "during": [None] * 2 * processes}
    assert content["filter"] == "64x10 "


def test_others_are_noted_before_and_after_the_measuring(monkeypatch, watched):
    monkeypatch.setattr(runner, "measured", measuring([]))
    monkeypatch.setattr(load, "others", lambda seconds: 0.6)
    # Of 10 seconds between two looks, the first process shares 4 with others, the rest none.
    looks = iter([load.Used(0, 0, 0), load.Used(10, 6, 2), *[load.Used(20, 8, 4)] * 99])
    monkeypatch.setattr(load.Used, "now", lambda: next(looks))
    content = runner.run("quick", text="64x10 ", progress=watched)
    assert "Other processes use 60% of the processors' time now" in watched.notes[0]
    assert content["load"]["before"] == [0.6]
    assert content["load"]["during"][0] == pytest.approx(0.4)
    assert "other processes used up to 40% of the processors' time" in content["notes"][0]


def test_ctrl_c_hands_over_what_was_measured(monkeypatch, watched):
    def measured(request):
        yield {"event": "environment", "threads": 1}
        if request.part:
            raise KeyboardInterrupt
        size = {"case": "4x64", "bytes": 1024, "pass": "forward", "us": {"copy": 1.0}}
        yield {"event": "size", **size, "allocator": request.allocator, "status": "ok"}

    monkeypatch.setattr(runner, "measured", measured)
    with pytest.raises(runner.Interrupted) as stopped:
        runner.run("quick", progress=watched)
    content = stopped.value.content
    assert not content["complete"]
    assert [size["allocator"] for size in content["sizes"]] == ["default", "no page faults"]

    def nothing(request):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(runner, "measured", nothing)
    with pytest.raises(KeyboardInterrupt) as stopped:
        runner.run("quick", progress=watched)
    assert stopped.value.content is None


def test_a_process_that_ctrl_c_reaches_first_is_not_called_dead(monkeypatch):
    started(monkeypatch, "import os, signal; signal.raise_signal(signal.SIGINT)")
    with pytest.raises(KeyboardInterrupt):
        list(runner.measured(REQUEST))


def test_what_was_disabled_is_in_the_command_and_what_cannot_be_is_refused(monkeypatch, watched):
    monkeypatch.setattr(runner, "measured", measuring([]))
    monkeypatch.setenv("BATCHNORM_DISABLE", "native")
    content = runner.run("quick", text="64x10", progress=watched)
    assert content["command"] == (
        "BATCHNORM_DISABLE=native batchnorm bench --suite quick --device cpu --filter 64x10"
    )
    monkeypatch.setenv("BATCHNORM_DISABLE", "triton,native")
    assert runner.run("quick", progress=watched)["command"].startswith(
        "BATCHNORM_DISABLE=triton,native batchnorm"
    )
    monkeypatch.setenv("BATCHNORM_DISABLE", "native,nativ")
    with pytest.raises(ArgumentError, match=r"names 'nativ', .* Expected: native, triton"):
        runner.run("quick", progress=watched)


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ({"device": "cuda"}, {"suite": "gpu"}, {"suite": "gpu", "device": "cuda"}):
        with pytest.raises(ArgumentError, match="expected a CUDA device, found none"):
            runner.run(**options)


def test_a_suite_is_measured_where_it_belongs(monkeypatch, watched):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options, device in (
        ({"suite": "gpu"}, "cuda"),
        ({"suite": "quick"}, "cpu"),
        ({"suite": "quick", "device": "cuda"}, "cuda"),
    ):
        asked = []
        monkeypatch.setattr(runner, "measured", measuring(asked))
        content = runner.run(**options, text="2x64x32x32 ", progress=watched)
        assert {request.device for request in asked} == {device}
        assert f" --device {device} " in content["command"]
        assert (watched.minutes is None) == (device == "cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "nope"}, "Expected one of: quick, full"),
        ({"device": "tpu"}, "Expected one of: cpu, cuda"),
        ({"suite": "gpu", "device": "cpu"}, "one of the CPU's suites: quick, full"),
        ({"suite": "gpu", "device": "tpu"}, "Expected one of: cpu, cuda"),
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


def test_a_gpu_is_described_by_torch_and_nvidia_smi(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\necho 'NVIDIA H100, 580.1, 345 MHz, 1980 MHz, 2619 MHz, 700.00 W, 31'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = types.SimpleNamespace(
        name="NVIDIA H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    found = environment("cuda", 0)
    assert found["device"] == "NVIDIA H100"
    gpu = found["gpu"]
    assert (gpu["capability"], gpu["multiprocessors"], gpu["l2_bytes"]) == ("9.0", 132, 50 << 20)
    assert (gpu["driver"], gpu["clock"], gpu["highest_clock"]) == ("580.1", "345 MHz", "1980 MHz")
    assert (gpu["memory_clock"], gpu["power_limit"]) == ("2619 MHz", "700.00 W")
    json.dumps(found)
    command.write_text("#!/bin/sh\nexit 9\n")
    assert nvidia_smi() == {}


def test_huge_pages_are_as_the_system_has_them(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages(tmp_path) == {"enabled": "madvise"}
    (tmp_path / "defrag").write_text("always defer defer+madvise madvise [never]\n")
    assert huge_pages(tmp_path) == {"enabled": "madvise", "defrag": "never"}
    assert huge_pages(tmp_path / "nothing") == {}


def test_what_the_readme_tells_to_set_is_what_is_measured():
    readme = Path(__file__).parents[2] / "benchmarks" / "README.md"
    settings = ALLOCATORS["no page faults"].items()
    assert " ".join(f"{name}={value}" for name, value in settings) in readme.read_text("utf-8")
