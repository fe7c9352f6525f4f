import dataclasses
import json
import math
import types

import pytest
import torch

from batchnorm import BatchNorm
from batchnorm.bench import cases, check, contest, device, measure, peers, worker
from batchnorm.bench.cases import FLOORS, FUSIONS, PASSES, SUITES, Case, Suite
from batchnorm.bench.measure import Times
from batchnorm.bench.worker import Request, work
from batchnorm.kernels import native

REQUEST = Request("quick", "", "cpu", None, "default", 0)

KEYS = {"case", "dtype", "layout", "pass", "fusion", "peer", "ratios", "bandwidth_fraction"}
KEYS |= {"allocator"}


@pytest.fixture
def tiny(monkeypatch):
    """A suite of one case and one size, which torch.compile takes part in."""
    case = Case((8, 3, 5))
    sizes = (Case((4, 64, 1, 1)),)
    suite = Suite((case,), frozenset({case}), sizes, rounds=6, processes=2, minutes=1)
    monkeypatch.setattr(cases, "SUITES", types.MappingProxyType({**SUITES, "quick": suite}))
    # Compiling takes seconds, and is left to one test.
    monkeypatch.setattr(torch, "compile", lambda expression, **_: expression)
    return suite


def times(**seconds):
    return {
        name.replace("_", " "): Times(tuple(values), (0.0,) * len(values))
        for name, values in seconds.items()
    }


def rows_of(events):
    return [event for event in events if event["event"] == "row"]


def test_everything_is_measured_once_and_announced(tiny):
    events = list(work(REQUEST))
    found = rows_of(events)
    combinations = {(row["pass"], row["fusion"], row["peer"]) for row in found}
    assert len(found) == len(combinations) == len(PASSES) * len(FUSIONS) * 2
    steps = [event["what"] for event in events if event["event"] == "step"]
    assert len(steps) == tiny.steps == 9 + 2
    assert steps[0] == "8x3x5 float32 contiguous, forward, bn"
    for row in found:
        assert row.keys() >= KEYS
        assert (row["case"], row["dtype"], row["layout"]) == ("8x3x5", "float32", "contiguous")
        assert (row["status"], row["allocator"]) == ("ok", "default")
        assert len(row["ratios"]) == 6
        assert min(row["ratios"]) > 0
        assert row["bandwidth_fraction"] > 0
        assert row["error"] <= row["error_bound"]
    sizes = [event for event in events if event["event"] == "size"]
    assert [size["pass"] for size in sizes] == ["forward", "forward+backward"]
    assert sizes[0]["bytes"] == 1024
    assert sizes[0]["us"].keys() == {"batchnorm", "torch eager", "copy"}


def test_a_row_from_known_times(tiny, monkeypatch):
    known = times(
        batchnorm=[1e-3, 2e-3, 1e-3],
        torch_eager=[3e-3, 4e-3, 9e-3],  # ratios 3, 2, 9
        copy=[1e-3, 1e-3, 0.5e-3],  # ratios 1, ½, ½
    )
    known["torch.compile"] = known["batchnorm"]
    monkeypatch.setattr(measure, "rounds", lambda *_, **__: known)
    for row in rows_of(work(REQUEST)):
        assert row["ratios"] == pytest.approx(
            {"torch eager": [3.0, 2.0, 9.0], "torch.compile": [1.0] * 3}[row["peer"]]
        )
        floor = FLOORS[row["pass"], row["fusion"]]
        # A copy moves 2B in twice the time that ours moves the floor in.
        assert row["bandwidth_fraction"] == pytest.approx(floor / 2 * 0.5)
        assert (row["ours_us"], row["copy_us"]) == pytest.approx((1e3, 1e3))


def test_the_contenders_take_turns_with_a_copy_and_with_gradients_only_in_training(
    tiny, monkeypatch
):
    seen = []

    def rounds(calls, number, **_):
        assert number == 6
        names = {"copy", "batchnorm", "torch eager"}
        assert set(calls) - {"torch.compile"} == names
        seen.append({name: call() for name, call in calls.items()})
        return {name: Times((1.0,), (0.0,)) for name in calls}

    monkeypatch.setattr(measure, "rounds", rounds)
    list(work(REQUEST))
    for found, (fusion, mode) in zip(
        seen, [(fusion, mode) for fusion in FUSIONS for mode in PASSES], strict=False
    ):
        for name in ("batchnorm", "torch eager", "torch.compile"):
            result = found[name]
            if mode == "forward+backward":
                assert len(result) == (4 if "add" in fusion else 3)
            else:
                assert result.requires_grad == (mode == "forward")
                assert bool((result >= 0).all()) == ("relu" in fusion)


class Off(BatchNorm):
    """Ours, and wrong by one part in a thousand where it is fused with relu."""

    def forward(self, x, mask=None, residual=None):
        y = super().forward(x, mask, residual)
        return y if self.activation is None else y * 1.001


def test_a_wrong_result_has_no_speed(tiny, monkeypatch):
    monkeypatch.setattr(peers, "BatchNorm", Off)
    for row in rows_of(work(REQUEST)):
        wrong = row["fusion"] != "bn"
        assert row["status"] == ("wrong result" if wrong else "ok")
        for key in ("ratios", "bandwidth_fraction", "ours_us", "peer_us"):
            assert (key in row) != wrong
        if wrong:
            assert row["error"] == pytest.approx(1e-3, rel=0.1) or row["error"] > 1e-3
            assert row["peer_error"] < row["error_bound"] < row["error"]


def test_a_size_with_a_wrong_result_has_no_time(tiny, monkeypatch):
    monkeypatch.setattr(
        peers, "BatchNorm", lambda *a, **k: torch.nn.BatchNorm2d(a[0], eps=0.1, device="cpu")
    )
    only_size = dataclasses.replace(REQUEST, text="4x64x1x1")
    sizes = [event for event in work(only_size) if event["event"] == "size"]
    assert [size["status"] for size in sizes] == ["wrong result"] * 2
    assert [size["us"] for size in sizes] == [None] * 2


def test_without_a_compiler_the_rest_is_measured_and_a_note_says_so(tiny, monkeypatch):
    def fail(*_):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda expression, **_: fail)
    events = list(work(REQUEST))
    assert {row["peer"] for row in rows_of(events)} == {"torch eager"}
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert set(notes) == {"Without torch.compile, RuntimeError: No working C++ compiler found"}


def test_an_error_of_ours_is_not_hidden(tiny, monkeypatch):
    class Broken(BatchNorm):
        def forward(self, *_, **__):
            raise RuntimeError("ours")

    monkeypatch.setattr(peers, "BatchNorm", Broken)
    for part in ("8x3x5", "4x64x1x1"):
        with pytest.raises(RuntimeError, match="ours"):
            list(work(dataclasses.replace(REQUEST, text=part)))


def test_page_faults_that_should_not_be_are_noted(tiny, monkeypatch):
    found = {name: Times((1.0,), (5.0,)) for name in ("batchnorm", "copy", *peers.PEERS)}
    monkeypatch.setattr(measure, "rounds", lambda *_, **__: found)
    label = dataclasses.replace(REQUEST, allocator="no page faults")
    texts = [e["text"] for e in work(label) if e["event"] == "note"]
    expected = "There were still page faults: no page faults, 8x3x5 float32 contiguous."
    assert set(texts) == {expected}
    assert not [e for e in work(REQUEST) if e["event"] == "note"]


def test_only_the_first_process_compares_with_float64(tiny, monkeypatch):
    monkeypatch.setattr(check, "judge", None)  # it would fail
    seeds = []

    def rounds(calls, number, *, seed, **_):
        seeds.append(seed)
        return {name: Times((1.0,), (0.0,)) for name in calls}

    monkeypatch.setattr(measure, "rounds", rounds)
    events = list(work(dataclasses.replace(REQUEST, part=1)))
    assert all("error" not in row and row["status"] == "ok" for row in rows_of(events))
    assert len(rows_of(events)) == 18
    assert set(seeds) == {1}  # other orders than those of the first
    assert not [event for event in events if event["event"] == "kernels"]
    with pytest.raises(TypeError):
        list(work(REQUEST))


def test_what_serves_is_told_by_torchs_record_of_a_call(tiny, monkeypatch):
    used = [event["native"] for event in work(REQUEST) if event["event"] == "kernels"]
    assert used == [native.MISSING is None] * 3
    monkeypatch.setattr(native, "serves", lambda *_: False)
    used = [event["native"] for event in work(REQUEST) if event["event"] == "kernels"]
    assert used == [False] * 3


@pytest.mark.slow
def test_torch_compile_is_compiled_and_right():
    case = Case((2, 64, 32, 32))
    problem = peers.Problem.of(case, "cpu", 0)
    contender = peers.compiled(case, "bn+add+relu", "cpu")
    assert contest.prepare([contender], problem, "forward+backward") == []
    seen = check.observe(contender, problem, "forward+backward")
    assert check.judge(seen, problem, "forward+backward", "bn+add+relu").right


def test_cold_tensors_take_turns_and_what_cannot_be_cold_is_left_out(tiny, monkeypatch):
    monkeypatch.setattr(device, "sets", lambda state, size, on: 3 if size == 8 * 3 * 5 * 4 else 0)
    seen = []

    def rounds(calls, number, **_):
        for call in calls.values():
            assert isinstance(call, device.Rotation)
            assert len(set(map(id, call.steps))) == 3
            assert None not in call.results  # their memory is there
        inputs = set()
        for _ in range(3):
            calls["batchnorm"]()
        for result in calls["batchnorm"].results:
            y = result[0] if isinstance(result, tuple) else result
            inputs.add(y.data_ptr())
        seen.append(len(inputs))
        return {name: Times((1.0,), (0.0,)) for name in calls}

    monkeypatch.setattr(measure, "rounds", rounds)
    events = list(work(dataclasses.replace(REQUEST, allocator=device.COLD)))
    assert seen == [3] * 9  # each result in a place of its own
    assert {row["allocator"] for row in rows_of(events)} == {"cold L2"}
    assert not [event for event in events if event["event"] == "size"]  # of 1 KB


def test_a_replay_counts_as_many_calls_as_were_captured(tiny, monkeypatch):
    known = {name: Times((1e-3,), (0.0,)) for name in ("batchnorm", "copy", *peers.PEERS)}
    monkeypatch.setattr(measure, "rounds", lambda *_, **__: known)
    replayed = dataclasses.replace(REQUEST, allocator=device.REPLAYED)
    monkeypatch.setattr(device, "l2_bytes", lambda _: 1 << 20)
    assert [row["ours_us"] for row in rows_of(work(replayed))] == pytest.approx([100.0] * 18)


def test_who_cannot_be_captured_is_left_out_and_a_note_says_so(tiny, monkeypatch):
    monkeypatch.setattr(device, "l2_bytes", lambda _: 1 << 20)
    captured = device.captured
    asked = []

    def some(call, on):
        asked.append(call)
        if len(asked) % 4 == 3:  # after the copy and ours, the first of the peers
            raise RuntimeError("operation not permitted\nand more")
        return captured(call, on)

    monkeypatch.setattr(device, "captured", some)
    request = dataclasses.replace(REQUEST, text="8x3x5", allocator=device.REPLAYED)
    events = list(work(dataclasses.replace(request, passes=("forward",))))
    assert {row["peer"] for row in rows_of(events)} == {"torch.compile"}
    notes = {event["text"] for event in events if event["event"] == "note"}
    assert notes == {"torch eager cannot be captured, RuntimeError: operation not permitted"}


def test_what_raises_is_told_and_the_next_is_measured(tiny, monkeypatch):
    class Sometimes(BatchNorm):
        def forward(self, x, mask=None, residual=None):
            if residual is not None:
                raise RuntimeError("out of resources")
            return super().forward(x, mask)

    monkeypatch.setattr(peers, "BatchNorm", Sometimes)
    events = list(work(dataclasses.replace(REQUEST, go_on=True)))
    assert [event for event in events if event["event"] == "failed"] == [
        {
            "event": "failed",
            "what": "8x3x5 float32 contiguous, bn+add+relu",
            "why": "RuntimeError: out of resources",
        }
    ]
    assert {row["fusion"] for row in rows_of(events)} == {"bn", "bn+relu"}


def test_what_was_checked_before_is_not_compared_again_and_wrong_stays_wrong(
    tiny, monkeypatch, tmp_path
):
    known = {"passes": ("forward", "inference"), "text": "8x3x5", "fusions": ("bn",)}
    request = dataclasses.replace(REQUEST, allocator=device.CHECKED, **known)
    first, second = (e for e in work(request) if e["event"] == "checked")
    file = tmp_path / "checked.jsonl"
    file.write_text(worker.line(first) + worker.line(second | {"error": float("nan")}))
    judged = []

    def judge(*args, **options):
        judged.append(args[2:])
        return check.Verdict(0.25, 0.5, "y")

    monkeypatch.setattr(check, "judge", judge)
    known["passes"] = ("forward", "forward+backward", "inference")
    request = dataclasses.replace(REQUEST, checked=str(file), peers=(peers.EAGER,), **known)
    right, own, wrong = rows_of(work(request))
    assert judged == [("forward+backward", "bn")] * 2  # ours and torch's: the file has it not
    assert (right["status"], right["error"]) == ("ok", first["error"])
    assert (own["status"], own["error"]) == ("ok", 0.25)
    assert (wrong["status"], wrong["error"]) == (
        "wrong result",
        pytest.approx(math.nan, nan_ok=True),
    )
    missing = dataclasses.replace(request, checked=str(tmp_path / "none"))
    assert [row["error"] for row in rows_of(work(missing))] == [0.25] * 3


@pytest.mark.parametrize(
    ("state", "name", "error", "kind"),
    [
        ("", "torch eager", RuntimeError("late"), "note"),
        ("", "torch eager", torch.AcceleratorError("late", 700), "failed"),
        ("", "batchnorm", RuntimeError("late"), "failed"),
        ("", "batchnorm", torch.OutOfMemoryError("late"), "note"),
        (device.CHECKED, "batchnorm", torch.OutOfMemoryError("late"), "failed"),
    ],
)
def test_whose_exception_it_was_is_told(tiny, monkeypatch, state, name, error, kind):
    def observe(contender, problem, mode):
        if contender.name == name:
            raise error
        return {}

    monkeypatch.setattr(check, "observe", observe)
    monkeypatch.setattr(check, "judge", lambda *_: check.Verdict(0.0, 1.0, "y"))
    only = {"text": "8x3x5", "fusions": ("bn",), "passes": ("forward",), "go_on": True}
    request = dataclasses.replace(REQUEST, allocator=state, peers=(peers.EAGER,), **only)
    (event,) = (e for e in work(request) if e["event"] in ("note", "failed"))
    assert event["event"] == kind
    told = event["text"] if kind == "note" else event["why"]
    memory = isinstance(error, torch.OutOfMemoryError)
    assert (name in told) == (name != "batchnorm")
    assert "late" in told or (memory and "for want of memory" in told)


def test_a_line_is_json_for_everybody():
    event = {"event": "row", "error": float("nan"), "ratios": [float("inf"), 1.5]}
    assert json.loads(worker.line(event), parse_constant=pytest.fail) == {
        "event": "row",
        "error": None,
        "ratios": [None, 1.5],
    }


def test_checks_compare_and_do_not_time(tiny, monkeypatch):
    monkeypatch.setattr(measure, "rounds", None)
    request = dataclasses.replace(REQUEST, allocator=device.CHECKED, text="8x3x5")
    events = list(work(request))
    found = [event["event"] for event in events if event["event"] != "step"]
    assert found == ["environment", *["checked"] * 9]
    monkeypatch.setattr(peers, "BatchNorm", Off)
    failed = [event for event in work(request) if event["event"] == "failed"]
    assert len(failed) == 6  # every pass of what is fused with relu
    assert failed[0]["what"] == "8x3x5 float32 contiguous, forward, bn+relu"
    assert failed[0]["why"].startswith("error 1.0e-03 in y, 3.8e-06 allowed")


def test_processes_share_the_cases_and_measure_what_they_are_asked(tiny, monkeypatch):
    several = tuple(Case((4, channels)) for channels in range(1, 6))
    suite = dataclasses.replace(tiny, cases=several, compiled=frozenset(), sizes=())
    monkeypatch.setattr(cases, "SUITES", types.MappingProxyType({"quick": suite}))
    found = []
    for k in range(2):
        request = dataclasses.replace(
            REQUEST, share=(k, 2), passes=("inference",), fusions=("bn",), peers=(peers.EAGER,)
        )
        rows = rows_of(work(request))
        assert {(row["pass"], row["fusion"], row["peer"]) for row in rows} == {
            ("inference", "bn", "torch eager")
        }
        found.append([row["case"] for row in rows])
    assert found == [["4x1", "4x3", "4x5"], ["4x2", "4x4"]]


def test_who_has_nothing_of_its_own_to_show_does_not_take_part():
    half = Case((2, 3, 4), torch.float16)
    assert peers.takes_part(peers.NATIVE, half, compiles=False)
    for other in (Case((2, 3), torch.float16), Case((2, 3, 4), torch.bfloat16)):
        assert not peers.takes_part(peers.NATIVE, other, compiles=True)
    for name in (peers.COMPILE, peers.AUTOTUNE):
        assert [peers.takes_part(name, half, compiles=c) for c in (True, False)] == [True, False]


def test_torch_is_kept_from_cudnn_only_while_that_peer_is_called():
    before = torch.backends.cudnn.enabled
    for make, inside in ((peers.without_cudnn, False), (peers.eager, before)):
        contender = make(Case((2, 3, 4)), "bn", "cpu")
        with contender.settings():
            assert torch.backends.cudnn.enabled == inside
        assert torch.backends.cudnn.enabled == before


def test_a_peer_is_timed_in_its_own_settings(tiny, monkeypatch):
    seen = set()

    class Layer(torch.nn.BatchNorm1d):
        def forward(self, x):
            seen.add(torch.backends.cudnn.enabled)
            return super().forward(x)

    monkeypatch.setitem(peers._TORCH, 3, Layer)
    case = Case((8, 3, 5))
    problem = peers.Problem.of(case, "cpu", 0)
    for make, enabled in ((peers.without_cudnn, False), (peers.eager, True)):
        seen.clear()
        contest.times(
            [make(case, "bn", "cpu")], [problem], "forward", rounds=2, seed=0, state="", on="cpu"
        )
        assert seen == {enabled}


def test_which_kernels_run_is_told_for_everyone(tiny):
    request = dataclasses.replace(REQUEST, allocator=device.PROFILED, passes=("inference",))
    profiles = [event for event in work(request) if event["event"] == "profile"]
    by = {(p["fusion"], p["contender"]): {k["name"] for k in p["kernels"]} for p in profiles}
    assert len(by) == 9
    assert "aten::native_batch_norm" in by["bn", "torch eager"]
    assert any(name.startswith("batchnorm::") for name in by["bn", "batchnorm"])
