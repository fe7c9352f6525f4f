"""What a session on a GPU has found: from events to the table and the page."""

import itertools
import json
from pathlib import Path

from batchnorm.bench import gpu, gpu_page
from batchnorm.bench.cases import FUSIONS, GPU_SUITES, PASSES
from batchnorm.bench.gpu import DIED, OK, SKIPPED, STOPPED, WRONG, Part
from batchnorm.bench.peers import AUTOTUNE, COMPILE, EAGER, GPU_PEERS, NATIVE

ROOT = Path(__file__).resolve().parents[2]

PLACE = {
    "event": "environment",
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "gpu": {"driver": "580.1", "cudnn": 91300, "l2_bytes": 52428800},
    "backends": ["native: no", "triton: serves eager calls on CUDA GPUs"],
}


def row(case, mode, fusion, peer, ours=1e-3, theirs=2e-3, state="cold L2", **changed):
    return {
        "event": "row",
        "case": case.name,
        "dtype": case.dtype_name,
        "layout": case.layout,
        "pass": mode,
        "fusion": fusion,
        "allocator": state,
        "peer": peer,
        "status": "ok",
        "ratios": [theirs / ours] * 7,
        "bandwidth_fraction": 0.5,
        "ours_us": ours * 1e6,
        "peer_us": theirs * 1e6,
        "copy_us": 400.0,
        "faults": 0.0,
        "cudnn": peer == EAGER and case.dtype_name == "float16",
        "error": 1e-3,
        "error_bound": 4e-3,
        "error_where": "dx",
        "peer_error": 1e-3,
        **changed,
    }


def session(**changed):
    cases = GPU_SUITES["gpu"].cases
    rows = [
        row(case, mode, fusion, peer)
        for case, mode, fusion, peer in itertools.product(cases, PASSES, FUSIONS, GPU_PEERS)
    ]
    resnet = {
        "event": "resnet",
        "ours_ms": 100.0,
        "eager_ms": 110.0,
        "plain_ms": 120.0,
        "ratio": 1.1,
        "interval": [1.05, 1.15],
        "ours_peak": 20e9,
        "eager_peak": 21e9,
        "plain_peak": 25e9,
        "losses": {"batchnorm": [6.9], "torch eager": [7.9]},
        "right": True,
    }
    return [PLACE, *rows, resnet]


NAMES = ("tests", "small calls", "memcheck", "racecheck", "synccheck", "cold", "ResNet-50")
NAMES += (*(f"suite, {k}/8" for k in range(1, 9)), "compile", "warm", "replayed", "kernels")
PARTS = [Part(name, OK, 12.3, "") for name in NAMES]


def summarised(events, parts=PARTS, **options):
    return gpu.summarise(events, parts, **{"rehearsal": False} | options)


def test_the_table_fits_whatever_has_happened():
    wrong = row(
        GPU_SUITES["gpu"].cases[0], "forward", "bn", EAGER, status="wrong result", error=9.9
    )
    failed = {"event": "failed", "what": "a case", "why": "RuntimeError: CUDA error\nand more"}
    bad = [*PARTS, Part("autotune", DIED, 1.0, "status -9, last: " + "Traceback, " * 30)]
    for events, parts in (
        (session(), PARTS),
        ([*session(), wrong, *[failed] * 50], bad),
        ([], []),
        ([], bad),
        ([PLACE], PARTS[:1]),
    ):
        lines = gpu.table(summarised(events, parts))
        assert len(lines) < gpu.LINES
        assert [line for line in lines if len(line) > gpu.WIDTH or "\n" in line] == []
        assert lines[-1] == ("nothing was wrong" if parts is not bad else lines[-1])


def test_the_table_has_the_numbers():
    content = summarised(session())
    lines = gpu.table(content)
    assert "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0+cu130, triton 3.6.0" in lines[0]
    # 2 · 822 MB of float32 in 400 µs.
    assert lines[1] == "copy: 4.11 TB/s (256x64x112x112 float32)"
    cases = len(GPU_SUITES["gpu"].cases)
    mean = next(line for line in lines if line.startswith("forward          bn  "))
    assert mean.split() == [
        "forward",
        "bn",
        *[f"2.00 ({cases})".split()[0], f"({cases})"] * 4,
        "75%",
    ]
    verdicts = {line[:52].strip(): line.split()[-1] for line in lines if line.endswith("met")}
    assert "bfloat16 forward+backward, against torch eager" in verdicts
    assert any(line.startswith("ResNet-50 step: 100.0 ms; eager 110.0 ms") for line in lines)
    assert content["complete"]
    assert not content["wrong"]
    json.dumps(content, allow_nan=False)


def test_what_was_wrong_is_told_and_nothing_else():
    case = GPU_SUITES["gpu"].cases[0]
    refused = row(case, "forward", "bn", EAGER, status="wrong result", error=0.5)
    nan = row(case, "inference", "bn", EAGER, status="wrong result", error=float("nan"))
    failed = {"event": "failed", "what": "a case", "why": "RuntimeError: no"}
    off = session()[-1] | {"right": False}
    parts = [Part("tests", WRONG, 1, "3 failed"), Part("cold", STOPPED, 1, "at a case")]
    content = summarised([PLACE, refused, nan, failed, off], parts)
    assert not content["complete"]
    assert content["wrong"] == [
        "tests wrong: 3 failed",
        "a case: RuntimeError: no",
        f"{case.title}, forward, bn: error 5.0e-01 in dx, at most 4.0e-03 allowed",
        f"{case.title}, inference, bn: error NaN in dx, at most 4.0e-03 allowed",
        "ResNet-50, losses by step: batchnorm 6.900, torch eager 7.900",
    ]


def test_a_session_that_did_not_get_to_see_whether_we_are_right_is_no_success():
    stopped = Part("suite, 1/8", STOPPED, 105, "at a case", proves=True)
    content = summarised([PLACE], [stopped, Part("cold", STOPPED, 1, "at a case")])
    assert (content["wrong"], content["complete"]) == ([], False)
    assert content["unproven"] == ["suite, 1/8 stopped: at a case"]
    assert gpu.table(content)[-2:] == [
        "NOT PROVEN: suite, 1/8 stopped: at a case",
        "0 wrong, 1 not proven",
    ]


def test_what_was_not_finished_is_named_where_nothing_was_wrong():
    parts = [
        Part("tests", SKIPPED, 0, "not installed: pytest", proves=True),
        Part("memcheck", SKIPPED, 0, "there is no compute-sanitizer"),
        Part("suite, 1/1", OK, 1, "", proves=True),
        Part("warm", STOPPED, 1, "at a case"),
    ]
    content = summarised([PLACE], parts[1:])
    assert (content["wrong"], content["unproven"]) == ([], [])
    assert gpu.table(content)[-1] == "nothing was wrong in what ran; not finished: warm"
    # What would have shown it, and was left out, is more than that.
    content = summarised([PLACE], parts)
    assert (content["wrong"], content["unproven"]) == ([], ["tests skipped: not installed: pytest"])
    assert gpu.table(content)[-2:] == [
        "NOT PROVEN: tests skipped: not installed: pytest",
        "0 wrong, 1 not proven",
    ]


def test_the_page_has_every_case_with_its_state_and_who_ran():
    case = GPU_SUITES["gpu"].cases[0]
    events = [
        PLACE,
        row(case, "forward", "bn", EAGER, ours=1e-3, theirs=3e-3),
        row(case, "forward", "bn", COMPILE, ours=1e-3, theirs=1.5e-3),
        row(case, "forward", "bn", NATIVE, state="warm L2", theirs=4e-3),
        {
            "event": "profile",
            "case": case.name,
            "dtype": case.dtype_name,
            "layout": case.layout,
            "pass": "forward",
            "fusion": "bn",
            "allocator": "kernels",
            "contender": "batchnorm",
            "kernels": [{"name": "moments_kernel", "times": 1.0, "us": 12.34}],
        },
    ]
    text = gpu_page.page(summarised(events))
    assert text.startswith("# Batch norm on a GPU: NVIDIA H100 80GB HBM3\n")
    assert "our own kernels ran in 1 of 1 profiled calls" in text
    events[-1]["kernels"][0]["name"] = "void at::native::batch_norm_kernel<float>(float*)"
    assert "our own kernels ran in 0 of 1 profiled calls" in gpu_page.page(summarised(events))
    events[-1]["kernels"][0]["name"] = "moments_kernel"
    cold, warm = text.partition("## Every case: cold L2")[2].split("## Every case: warm L2")
    assert f"| {case.title} | forward | bn | 1000.0 | 400.0 | 75% | 3.00 (3.00 to 3.00) |" in cold
    assert "1.50 (1.50 to 1.50)" in cold
    assert "cuDNN" not in cold
    half = row(case, "forward", "bn", EAGER, dtype="float16", cudnn=True)
    assert "2.00 (2.00 to 2.00), cuDNN" in gpu_page.page(summarised([PLACE, half]))
    assert "4.00 (4.00 to 4.00)" in warm
    assert "moments_kernel 12.3" in text
    assert "triton: serves eager calls on CUDA GPUs" in text
    for target in summarised(events)["targets"]:
        assert f"**{target['verdict']}**: {target['name']}, {target['wanted']}" in text


def test_a_case_that_is_wrong_has_no_speed_on_the_page():
    case = GPU_SUITES["gpu"].cases[0]
    nothing = dict.fromkeys(("ratios", "bandwidth_fraction", "ours_us", "copy_us"))
    refused = row(case, "forward", "bn", EAGER, status="wrong result", **nothing)
    text = gpu_page.page(summarised([PLACE, refused]))
    assert f"| {case.title} | forward | bn | wrong |  |  |  |" in text


def test_a_rehearsal_says_so_and_tells_no_times():
    place = PLACE | {"device": "cpu", "batchnorm": "1", "commit": "abc", "date": "now", "seed": 0}
    note = {"event": "note", "text": "it could not"}
    content = summarised([place, *session()[1:], note], rehearsal=True)
    assert content["targets"] == []
    first, software, *parts, blank, last = gpu.table(content)
    assert first.startswith("REHEARSAL on the CPU")
    assert software == "torch 2.11.0+cu130, triton 3.6.0"
    assert [line.split("  ")[0] for line in parts] == list(NAMES)
    assert (blank, last) == ("", "nothing was wrong")
    text = gpu_page.page(content)
    assert text.startswith("# A rehearsal, without a GPU\n\nNothing was measured: ")
    assert f"```text\n{first}\n" in text
    assert "triton: serves" in text
    assert "--rehearse\n" in text
    assert "> it could not\n" in text
    for looks_like_a_result in ("None", "×", "%", "µs", "missed", "GB", "°C"):
        assert looks_like_a_result not in text
    assert not [line for line in gpu.table(summarised(session())) if "REHEARSAL" in line]


def test_the_committed_page_is_that_of_the_committed_results():
    results = ROOT / "benchmarks" / "results" / "gpu.json"
    content = json.loads(results.read_text("utf-8")) if results.exists() else None
    assert results.with_suffix(".md").read_text("utf-8") == gpu_page.page(content)
    if content is None:
        assert "nothing is claimed" in gpu_page.page(content)
    else:
        assert not content["rehearsal"]


def test_every_peer_has_a_column():
    assert set(gpu._SHORT) == set(GPU_PEERS) == {EAGER, NATIVE, COMPILE, AUTOTUNE}
