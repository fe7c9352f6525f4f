import itertools
import re

import pytest
import torch

from batchnorm.bench.cases import (
    FLOORS,
    FUSIONS,
    GPU_SUITES,
    PASSES,
    SMALL_C,
    SUITES,
    TWO_PASS,
    Case,
    find,
)
from batchnorm.errors import ArgumentError

#: What a step reads and writes once, by name.
FORWARD = {"bn": ["x", "y"], "bn+relu": ["x", "y"], "bn+add+relu": ["x", "residual", "y"]}
BACKWARD = {
    "bn": ["x", "dy", "dx"],
    "bn+relu": ["x", "dy", "dx"],
    "bn+add+relu": ["x", "dy", "dx", "dresidual"],
}


def test_floors_count_the_tensors_that_move():
    assert list(FLOORS) == list(itertools.product(PASSES, FUSIONS))
    for fusion in FUSIONS:
        forward, backward = len(FORWARD[fusion]), len(BACKWARD[fusion])
        assert FLOORS["forward", fusion] == FLOORS["inference", fusion] == forward
        assert FLOORS["forward+backward", fusion] == forward + backward
    with pytest.raises(TypeError):
        FLOORS["forward", "bn"] = 1


def test_what_no_cache_holds_is_read_as_often_as_it_is_needed():
    again = {"forward": ["x"], "backward": ["x", "dy"]}
    assert list(TWO_PASS) == list(FLOORS)
    for fusion in FUSIONS:
        # With a residual, its gradient is dz, which the second reading takes in dy's place.
        forward = len(FORWARD[fusion] + again["forward"])
        backward = len(BACKWARD[fusion] + again["backward"])
        assert TWO_PASS["forward", fusion] == forward
        assert TWO_PASS["forward+backward", fusion] == forward + backward
        assert TWO_PASS["inference", fusion] == FLOORS["inference", fusion]


def test_the_gpus_suite_has_what_its_targets_ask_for():
    suite = GPU_SUITES["gpu"]
    assert suite.compiled <= set(suite.cases)
    assert set(SMALL_C) <= set(suite.cases)
    kinds = {(case.dtype, case.layout) for case in suite.cases if case.bytes >= 100e6}
    for dtype in (torch.bfloat16, torch.float16):
        assert (dtype, "channels-last") in kinds
    assert {(torch.bfloat16, "contiguous"), (torch.bfloat16, "dense")} <= kinds
    resnet = {case.shape for case in suite.cases if case.channels_last and case.shape[0] == 256}
    assert len(resnet) >= 9
    assert len(set(suite.cases)) == len(suite.cases)


def test_the_full_suite_has_the_cases_that_were_promised():
    titles = [case.title for case in SUITES["full"].cases]
    assert len(set(titles)) == len(titles)
    resnet = ("64x112x112", "64x56x56", "256x56x56", "128x28x28", "512x28x28", "256x14x14")
    resnet += ("1024x14x14", "512x7x7", "2048x7x7")
    expected = {f"{n}x{rest} float32 contiguous" for n in (8, 32) for rest in resnet}
    expected |= {
        f"{shape} float32 dense"
        for shape in ("64x10", "64x256", "16384x10", "4096x1024", "65536x64")
    }
    expected |= {
        f"{shape} float32 contiguous" for shape in ("2x64x32x32", "32x128x512", "8x16x32x32x32")
    }
    expected |= {
        "32x64x56x56 float32 channels-last",
        "4096x1024 bfloat16 dense",
        "32x64x56x56 bfloat16 contiguous",
        "32x64x56x56 bfloat16 channels-last",
    }
    assert set(titles) == expected
    assert SUITES["full"].compiled == set(SUITES["full"].cases)
    for suite in SUITES.values():
        assert suite.processes >= 3
        assert suite.processes * suite.rounds >= 12


def test_sizes_double_from_1_kb_to_400_mb():
    full = [case.bytes for case in SUITES["full"].sizes]
    quick = [case.bytes for case in SUITES["quick"].sizes]
    assert (full[0], full[-1]) == (1 << 10, 400 << 20)
    assert (quick[0], quick[-1]) == (1 << 10, 16 << 20)
    assert all(b == 2 * a for a, b in itertools.pairwise(full[:-1]))
    assert full[: len(quick)] == quick


def test_a_case_says_what_it_is():
    case = Case((2, 3, 5), torch.bfloat16)
    assert (case.title, case.bytes) == ("2x3x5 bfloat16 contiguous", 60)


def test_the_filter_chooses_by_title_without_case():
    chosen = find("full", "BFLOAT16 c")
    assert [case.layout for case in chosen.cases] == ["contiguous", "channels-last"]
    assert chosen.sizes == ()
    assert chosen.rounds == SUITES["full"].rounds
    assert chosen.steps == 2 * 9
    assert chosen.minutes == pytest.approx(SUITES["full"].minutes * 18 / SUITES["full"].steps)


@pytest.mark.parametrize(
    ("suite", "text", "message"),
    [
        (
            "nope",
            "",
            "There is no suite called 'nope'. Expected one of: quick, full, gpu, rehearsal.",
        ),
        ("quick", "7x7x7x7", "has '7x7x7x7' in its name. Expected part of one of: 64x10 float32"),
        (
            "quick",
            "32x64x56x56",
            "in its name. The full suite has some: add --suite full. Expected",
        ),
    ],
)
def test_what_there_is_not(suite, text, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        find(suite, text)
