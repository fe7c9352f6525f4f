"""benchmarks/gpu.py, and what it runs: parts, their limits and what they are taken to say."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    # A dataclass looks its module up.
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules[name]
    return module


script, resnet50, small_calls = load("gpu"), load("resnet50"), load("small_calls")


def job(name, code, share=60.0, judge=script.measured, **options):
    return script.Job(name, [sys.executable, "-c", code], share, judge, **options)


def ran(*stages, tmp_path=None):
    session = script.Session([], tmp_path, rehearsal=True)
    session.run(stages)
    return session, {part.name: part for part in session.parts}


def test_events_are_kept_and_words_are_what_a_part_ended_with():
    code = """
import sys
print('{"event": "step", "what": "a case"}')
print('{"event": "note", "text": "1x2"}')
print('{"event": "note", "text": "half')
print("some words")
print("an error", file=sys.stderr)
"""
    session, parts = ran([[job("good", code), job("bad", code + "sys.exit(3)")]])
    assert session.events == [{"event": "note", "text": "1x2"}] * 2
    assert parts["good"].status == "ok"
    assert (parts["bad"].status, parts["bad"].says) == ("died", "status 3, last: an error")


def test_a_part_that_hangs_is_ended_with_all_that_it_started_and_the_rest_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "TOTAL_S", 6)
    marker = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(marker)!r}, "w").write(str(child.pid))
print('{{"event": "note", "text": "first"}}', flush=True)
print('{{"event": "step", "what": "the second"}}', flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    after = job("after", 'print(\'{"event": "note", "text": "after"}\')', share=3)
    session, parts = ran([[job("hangs", code, share=3)]], [[after]])
    assert time.monotonic() - start < 20
    assert (parts["hangs"].status, parts["hangs"].says) == ("stopped", "at the second")
    assert parts["after"].status == "ok"
    assert [event["text"] for event in session.events] == ["first", "after"]
    for _ in range(100):  # until the system has taken it away
        if not running(int(marker.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("what the part had started still runs")


def test_in_a_lane_none_takes_the_time_of_the_next(monkeypatch):
    monkeypatch.setattr(script, "TOTAL_S", 6)
    _, parts = ran(
        [
            [
                job("hangs", "import time; time.sleep(60)", share=3),
                job("after", "import time; time.sleep(1.5)", 3),
            ]
        ]
    )
    assert [part.status for part in parts.values()] == ["stopped", "ok"]


def running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_lanes_run_beside_each_other_and_results_are_written_after_each_stage(tmp_path):
    wait = "import time; time.sleep(1.5)"
    start = time.monotonic()
    session = script.Session([tmp_path / "deep" / "gpu.json"], tmp_path, rehearsal=True)
    session.run([[[job("a", wait)], [job("b", wait)], [job("c", "", missing="no tool")]]])
    assert time.monotonic() - start < 2.9
    content = json.loads((tmp_path / "deep" / "gpu.json").read_text())
    assert {part["name"]: part["status"] for part in content["parts"]} == {
        "a": "ok", "b": "ok", "c": "skipped"
    }  # fmt: skip
    assert (tmp_path / "deep" / "gpu.md").read_text().startswith("# A rehearsal")
    assert "==== a: ok" in (tmp_path / "gpu.log").read_text()


PYTEST = """
[gw0] [ 25%] PASSED tests/kernels/triton/test_a.py::test_one[x]
tests/kernels/triton/test_a.py::test_two PASSED                  [ 50%]
[gw1] [ 75%] {} tests/kernels/triton/test_a.py::test_three
[gw1] [100%] SKIPPED tests/kernels/triton/test_a.py::test_four
FAILED tests/kernels/triton/test_a.py::test_three - assert 0
""".strip()


@pytest.mark.parametrize(
    ("outcome", "status", "expected"),
    [
        ("PASSED", 0, ("ok", "3 passed, 0 failed, 1 skipped")),
        ("FAILED", 1, ("wrong", "2 passed, 1 failed, 1 skipped")),
        ("ERROR", None, ("wrong", "2 passed, 1 failed, 1 skipped")),
        ("PASSED", None, ("stopped", "3 passed, 0 failed, 1 skipped until time was up")),
        ("PASSED", 1, ("died", "pytest ended with status 1, 3 passed, 0 failed, 1 skipped")),
        ("PASSED", 4, ("died", "pytest ended with status 4, 3 passed, 0 failed, 1 skipped")),
    ],
)
def test_what_pytest_says(outcome, status, expected):
    assert script.tested(status, PYTEST.format(outcome).splitlines()) == expected


def test_no_test_at_all_is_not_a_success():
    assert script.tested(5, ["no tests ran"])[0] == "died"
    assert script.tested(0, [])[0] == "died"
    skipped = ["a.py::x SKIPPED (no triton) [ 50%]", "a.py::y SKIPPED [100%]"]
    assert script.tested(0, skipped)[0] == "died"
    assert script.checked(0, [])[0] == "died"
    assert script.checked(0, ["a case"])[0] == "ok"
    assert script.checked(None, [])[0] == "stopped"


UNSUPPORTED = "does not support this device"
RACES = "========= RACECHECK SUMMARY: 3 hazards displayed ({} errors, 3 warnings)"
RIGHT = ["right: 4x3 float32, bn", "right: 4x3 float32, bn+relu"]


@pytest.mark.parametrize(
    ("status", "lines", "expected"),
    [
        (0, RIGHT, ("ok", "2 calls")),
        (
            0,
            [*RIGHT, "========= ERROR SUMMARY: 0 errors"],
            ("ok", "2 calls, ERROR SUMMARY: 0 errors"),
        ),
        (
            script.FOUND,
            ["========= Invalid __global__ read", *RIGHT, "========= ERROR SUMMARY: 3 errors"],
            ("wrong", "2 calls, ERROR SUMMARY: 3 errors"),
        ),
        (None, RIGHT, ("stopped", "2 calls until time was up")),
        (None, ["========= Invalid __global__ read"], ("wrong", "0 calls until time was up")),
        (None, ["========= Error: Race reported"], ("wrong", "0 calls until time was up")),
        (None, ["========= Warning: Race reported"], ("stopped", "0 calls until time was up")),
        (
            None,
            ["========= Error: Target application terminated before first instrumented API call"],
            ("stopped", "0 calls until time was up"),
        ),
        (0, [], ("died", "status 0, 0 calls")),
        (
            0,
            [*RIGHT, "========= Internal Sanitizer Error: it"],
            ("died", "Internal Sanitizer Error, 2 calls"),
        ),
        (
            script.FOUND,
            [*RIGHT, RACES.format(0)],
            ("ok", "2 calls, RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)"),
        ),
        (
            script.FOUND,
            [*RIGHT, RACES.format(1)],
            ("wrong", "2 calls, RACECHECK SUMMARY: 3 hazards displayed (1 errors, 3 warnings)"),
        ),
        (1, [*RIGHT, "WRONG: it"], ("wrong", "1 of 3 calls; first WRONG: it")),
        (-11, RIGHT, ("died", "status -11, 2 calls")),
        (255, ["Device not supported"], ("skipped", f"compute-sanitizer {UNSUPPORTED}")),
    ],
)  # fmt: skip
def test_what_small_calls_and_the_sanitizer_say(status, lines, expected):
    assert script.called(status, lines) == expected


@pytest.mark.parametrize("rehearse", [False, True])
def test_a_session_fits_its_time_and_asks_for_what_there_is(rehearse):
    measuring = script.speed(rehearse=rehearse, checked=Path("x"))
    stages = [script.correctness(rehearse=rehearse), *measuring]
    shares = sum(max(sum(j.share for j in lane) for lane in stage) for stage in stages)
    assert shares < script.TOTAL_S <= 460
    proving = {j.name.split(",")[0] for stage in stages for lane in stage for j in lane if j.proves}
    assert proving == {"tests", "suite", "small calls"}
    for one in (j for stage in stages for lane in stage for j in lane if not j.missing):
        assert Path(one.command[0]).exists()
        if "batchnorm.bench.worker" in one.command:
            request = script.Request(**json.loads(one.command[-1]))
            assert script.worker.cases.find(request.suite, request.text).cases
            assert request.device == ("cpu" if rehearse else "cuda")


def test_a_session_is_refused_where_it_would_not_be_about_our_kernels(monkeypatch):
    monkeypatch.delenv("BATCHNORM_DISABLE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "expected a CUDA GPU" in script.unfit(rehearse=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script.triton, "missing", lambda: "triton is not installed")
    assert "found none: triton is not installed" in script.unfit(rehearse=False)
    monkeypatch.setattr(script.triton, "missing", lambda: None)
    assert script.unfit(rehearse=False) is None
    for name in ("BATCHNORM_DISABLE", "TRITON_INTERPRET"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "1")
            why = script.unfit(rehearse=False)
            assert f"expected {name} not to be set, found {name}=1" in why


def started(*arguments, without=(), **environment):
    """The script in a process that cannot import what it shall do without."""
    code = f"""
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {without!r} else find_spec(name, *a)
for name in {without!r}:
    sys.modules[name] = None
sys.argv = ["gpu.py", *{arguments!r}]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "BATCHNORM_DISABLE": "", "TRITON_INTERPRET": "", **environment},
        capture_output=True,
        text=True,
    )


def test_without_torch_there_is_a_line_that_says_what_to_do():
    done = started(without=("torch",))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"expected a python with torch and triton, found {sys.executable} with")
    assert line.endswith("make gpu PYTHON=.venv/bin/python")


@pytest.mark.parametrize(
    ("without", "disabled", "why"),
    [
        (("triton",), "", "triton is not installed: pip install triton"),
        ((), "triton", "the environment variable BATCHNORM_DISABLE names it"),
    ],
)
def test_what_is_not_triton_is_not_rehearsed(without, disabled, why):
    done = started("--rehearse", without=without, BATCHNORM_DISABLE=disabled)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "expected Triton, whose interpreter runs our kernels, found none: "
        f"{why}. Nothing was rehearsed.\n"
    )


@pytest.mark.parametrize("rehearse", [False, True])
def test_tests_that_cannot_run_leave_a_session_unfinished(rehearse, monkeypatch):
    find = importlib.util.find_spec
    absent = ("pytest", "numpy")
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    stage = script.correctness(rehearse=rehearse)
    (tests,) = stage[0]
    session, parts = ran([[tests]])
    assert parts["tests"].status == "skipped"
    says = "tests skipped: to run them: pip install pytest numpy"
    assert session.content()["unproven"] == [says]


def test_the_kernels_tests_need_pytest_and_numpy_and_no_more():
    code = """
import sys
for name in ("hypothesis", "xdist", "rich", "typer", "matplotlib", "jinja2", "psutil"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/kernels/triton"]))
"""
    # Nor plugins, of which one would import hypothesis.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " tests collected" in done.stdout


@pytest.mark.parametrize(
    ("listed", "options"),
    [
        ("  --kernel-name-exclude arg  it", ["--kernel-name-exclude", "kns=_Z"]),
        ("  --kernel-regex-exclude arg  it", ["--kernel-regex-exclude", "kns=_Z"]),
        ("  --tool arg", []),
    ],
)
def test_tools_are_kept_from_torchs_kernels_where_they_can_be(tmp_path, listed, options):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{listed}'\n")
    tool.chmod(0o755)
    assert script.ours_only(str(tool)) == options


def test_small_calls_leave_the_device_what_is_ours_and_judge_on_the_cpu(monkeypatch):
    seen = []

    def observe(_, problem, mode):
        seen.append(("observe", problem.x.device.type))
        return {"y": torch.empty(())}

    def judge(found, problem, mode, fusion):
        seen.append(("judge", problem.x.device.type))
        return small_calls.check.Verdict(0.0, 1.0, "y")

    monkeypatch.setattr(small_calls.check, "observe", observe)
    monkeypatch.setattr(small_calls.check, "judge", judge)
    case = small_calls.Case((2, 3, 4, 4), channels_last=True)
    assert all(right for _, right in small_calls.by_the_suite(case, "meta"))
    assert set(seen) == {("observe", "meta"), ("judge", "cpu")}


def test_what_was_checked_goes_to_those_who_measure(tmp_path):
    file = tmp_path / "checked.jsonl"
    session = script.Session([], None, rehearsal=True, checked=file)
    lines = ['{"event": "checked", "error": 1}\n', '{"event": "note", "text": "a"}\n']
    for line in lines:
        session._hear(line, [])
    assert file.read_text() == lines[0]
    for stage in script.speed(rehearse=True, checked=file):
        command = stage[0][0].command
        if "batchnorm.bench.worker" in command:
            assert script.Request(**json.loads(command[-1])).checked == str(file)


def test_what_looks_like_an_event_and_is_none_is_kept_as_words():
    session = script.Session([], None, rehearsal=True)
    lines = []
    session._hear('{"event": "step" garbage}\n', lines)
    session._hear('{"event": "no', lines)
    assert (lines, session.events) == (['{"event": "step" garbage}', '{"event": "no'], [])


@pytest.mark.slow
def test_what_is_ended_from_outside_is_written_as_far_as_it_came(tmp_path):
    path = tmp_path / "gpu.json"
    code = f"""
import pathlib, signal, sys
sys.path.insert(0, "benchmarks")
import gpu
signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended from outside."))
note = 'print(\\'{{"event": "note", "text": "first"}}\\', flush=True); '
def job(name, code):
    return gpu.Job(name, [sys.executable, "-c", code], 60, gpu.measured, proves=True)
session = gpu.Session([pathlib.Path({str(path)!r})], None, rehearsal=True)
print("begun", flush=True)
session.run([[[job("long", note + "import os, signal, time; "
    "os.kill(" + str(__import__("os").getpid()) + ", signal.SIGTERM); time.sleep(60)")]],
    [[job("never", "")]]])
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Ended from outside." in done.stderr
    assert time.monotonic() - start < 50
    content = json.loads(path.read_text())
    assert content["notes"] == ["first"]
    assert {part["name"]: part["status"] for part in content["parts"]} == {
        "long": "stopped", "never": "stopped"
    }  # fmt: skip
    assert len(content["unproven"]) == 2
    assert (content["complete"], content["wrong"]) == (False, [])


def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    before = {path: path.stat().st_mtime for path in (ROOT / "benchmarks/results").iterdir()}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "expected a CUDA GPU" in done.stderr
    after = {path: path.stat().st_mtime for path in (ROOT / "benchmarks/results").iterdir()}
    assert before == after


@pytest.mark.slow
def test_the_rehearsal_goes_through_every_part(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--rehearse", "--json", tmp_path / "gpu.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    skipped = {part["name"] for part in content["parts"] if part["status"] != "ok"}
    assert skipped <= {"memcheck", "racecheck", "synccheck"}
    assert {row["allocator"] for row in content["rows"]} == {
        "cold L2", "warm L2", "warm L2, replayed"
    }  # fmt: skip
    assert {row["peer"] for row in content["rows"]} == set(script.gpu.GPU_PEERS)
    assert content["profiles"]
    assert content["resnet"]["right"]
    assert (content["wrong"], content["rehearsal"]) == ([], True)
    assert content["environment"]["triton"] in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing was wrong"
    # What only a GPU's results are told by.
    script.gpu.table(content | {"rehearsal": False})
    script.page(content | {"rehearsal": False})


def test_it_is_the_network_that_everybody_calls_resnet_50():
    model = resnet50.resnet(resnet50.Plain, resnet50.Size())
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 53


def test_losses_of_every_step_must_be_alike():
    theirs = [7.0, 6.5, 6.0]
    assert resnet50.alike([7.1, 6.7, 5.8], theirs)
    assert not resnet50.alike([7.0, 6.5, 7.0], theirs)  # as without a gradient
    assert not resnet50.alike([7.3, 6.5, 6.0], theirs)
    assert not resnet50.alike([7.0, float("nan"), 6.0], theirs)


def test_its_networks_start_alike_and_differ_in_rounding_only():
    trainings = [
        resnet50.Training(norm, resnet50.REHEARSED, "cpu")
        for norm in (resnet50.Plain, resnet50.InPlace, resnet50.Fused)
    ]
    states = [training.model.state_dict() for training in trainings]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])
        assert torch.equal(value, states[2][name])
    losses = [
        torch.nn.functional.cross_entropy(training.model(training.x), training.labels)
        for training in trainings
    ]
    # In float32: some forty layers, a few roundings of 2⁻²⁴ each.
    plain, in_place, fused = (float(loss.detach()) for loss in losses)
    assert in_place == plain
    assert fused == pytest.approx(plain, rel=1e-4)
    sum(losses).backward()
    gradients = [[p.grad for p in training.model.parameters()] for training in trainings]
    for plain, in_place, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(in_place, plain)
        torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-3 * float(plain.abs().max()))


def test_nothing_but_torch_is_needed():
    code = """
import runpy, sys
for name in ("rich", "typer", "numpy", "matplotlib", "pytest", "hypothesis", "jinja2", "psutil"):
    sys.modules[name] = None  # importing it raises
for name in ("gpu", "resnet50", "small_calls"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"benchmarks/{name}.py", run_name="__main__")
    except SystemExit as left:
        assert not left.code
from batchnorm.bench import cases, worker
request = worker.Request("rehearsal", "4x2 ", "cpu", None, "warm L2", 0, go_on=True)
assert "row" in [event["event"] for event in worker.work(request)]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
