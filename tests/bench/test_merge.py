import pytest

from batchnorm.bench import merge


def part(ratios, **others):
    return {
        "case": "8x3",
        "dtype": "float32",
        "layout": "dense",
        "pass": "forward",
        "fusion": "bn",
        "allocator": "default",
        "peer": "torch eager",
        "status": "ok",
        "ratios": ratios,
        "bandwidth_fraction": 0.5,
        "ours_us": 1.0,
        "peer_us": 2.0,
        "copy_us": 3.0,
        "faults": 0.0,
        **others,
    }


CHECKED = {"error": 1e-7, "error_bound": 4e-6, "error_where": "dx", "peer_error": 2e-7}


def test_rows_of_several_processes_become_one():
    parts = [
        part([2.0, 2.2, 2.1], **CHECKED, ours_us=1.0, faults=4.0),
        part([9.0], peer="torch.compile", **CHECKED),
        part([2.4, 2.5, 2.3], ours_us=3.0),
        part([9.0], peer="torch.compile"),
        part([2.0, 9.0, 2.0], ours_us=2.0),
        part([9.0], peer="torch.compile"),
    ]
    eager, compiled = merge.rows(parts)
    assert eager["by_process"] == [2.1, 2.4, 2.0]
    assert (eager["ratio"], eager["ours_us"], eager["faults"]) == pytest.approx((2.1, 2.0, 0.0))
    assert (eager["rounds"], eager["status"], eager["error"]) == (9, "ok", 1e-7)
    low, high = eager["interval"]
    assert low <= 2.0 <= 2.4 <= high
    assert (compiled["peer"], compiled["rounds"]) == ("torch.compile", 3)
    assert compiled["ratio"] == pytest.approx(9.0)


def test_a_result_that_is_wrong_in_one_process_has_no_ratio():
    wrong = {key: part([1.0])[key] for key in merge.ROW}
    (row,) = merge.rows([{**wrong, **CHECKED, "status": "wrong result"}, part([2.0])])
    assert (row["status"], row["ratio"], row["interval"], row["rounds"]) == (
        "wrong result",
        None,
        None,
        0,
    )
    assert row["error"] == 1e-7


def test_noise_of_one_allocator_is_not_that_of_the_other():
    parts = [
        part([ratio], allocator=allocator, fusion=fusion)
        for allocator, ratios in (("default", (1.0, 3.0, 1.0)), ("other", (2.0, 2.02, 2.0)))
        for fusion in ("bn", "bn+relu")
        for ratio in ratios
    ]
    assert [(row["allocator"], row["noisy"]) for row in merge.rows(parts)] == [
        ("default", True),
        ("default", True),
        ("other", False),
        ("other", False),
    ]


def test_sizes_are_medians_and_wrong_if_one_is():
    size = {"case": "4x64", "bytes": 1024, "pass": "forward", "allocator": "default"}
    right = [{**size, "status": "ok", "us": {"copy": value}} for value in (1.0, 9.0, 2.0)]
    assert merge.sizes(right) == [{**size, "status": "ok", "us": {"copy": 2.0}}]
    (found,) = merge.sizes([*right, {**size, "status": "wrong result", "us": None}])
    assert (found["status"], found["us"]) == ("wrong result", None)


def test_bytes_are_told_from_names():
    assert merge.bytes_of({"case": "2x3x5", "dtype": "bfloat16"}) == 60
    assert merge.bytes_of({"case": "2x3", "dtype": "float32"}) == 24
