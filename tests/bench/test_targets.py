import pytest

from batchnorm.bench import targets
from batchnorm.bench.peers import COMPILE, EAGER, NATIVE


def row(**changed):
    known = {
        "case": "256x64x112x112",
        "dtype": "bfloat16",
        "layout": "channels-last",
        "pass": "forward+backward",
        "fusion": "bn",
        "allocator": "cold L2",
        "peer": EAGER,
        "ratio": 3.0,
        "interval": [2.9, 3.1],
        "bandwidth_fraction": 0.5,
        "copy_us": 1e3,
        "ours_us": 1e3,
        "cudnn": False,
    }
    return known | changed


def verdicts(rows, resnet=None):
    return {t["name"]: (t["verdict"], t["got"]) for t in targets.judge(rows, resnet)}


FORWARD, BOTH, EAGERS, COMPILED, CUDNN, SMALL, STEP, MEMORY = verdicts([])


def test_nothing_is_claimed_of_what_was_not_measured():
    assert set(verdicts([]).values()) == {("not measured", None)}
    refused = row(ratio=None, bandwidth_fraction=None)
    assert set(verdicts([refused]).values()) == {("not measured", None)}


def test_the_slowest_large_tensor_decides_what_part_of_a_copys_speed_is_reached():
    # 0.6 of the fewest bytes, 5 for 8: 0.96 when what is read twice is counted twice.
    rows = [row(bandwidth_fraction=0.6), row(case="256x256x56x56", bandwidth_fraction=0.5)]
    small = row(case="256x512x7x7", bandwidth_fraction=0.1)
    assert verdicts([*rows, small])[BOTH] == ("missed", pytest.approx(0.5 * 8 / 5))
    assert verdicts([rows[0], small])[BOTH] == ("met", pytest.approx(0.6 * 8 / 5))
    forward = row(**{"pass": "forward"}, fusion="bn+add+relu", bandwidth_fraction=0.85 * 3 / 4)
    assert verdicts([forward])[FORWARD] == ("met", pytest.approx(0.85))
    assert verdicts([row(peer=NATIVE)])[BOTH] == ("not measured", None)


def test_means_are_geometric_and_of_the_right_rows():
    rows = [
        row(ratio=1.0),
        row(ratio=4.0, fusion="bn+relu"),
        row(ratio=100.0, dtype="float32"),
        row(ratio=100.0, **{"pass": "inference"}),
        row(ratio=1.1, peer=COMPILE),
    ]
    found = verdicts(rows)
    assert found[EAGERS] == ("met", pytest.approx(2.0))
    assert found[COMPILED] == ("missed", pytest.approx(1.1))


def test_of_a_case_in_the_cache_and_out_of_it_the_second_counts():
    cold, warm = row(ratio=3.0), row(ratio=0.5, allocator="warm L2")
    replayed = row(ratio=0.1, allocator="warm L2, replayed")
    assert verdicts([warm, cold, replayed])[EAGERS] == ("met", pytest.approx(3.0))
    assert verdicts([warm, replayed])[EAGERS] == ("missed", pytest.approx(0.5))


def test_cudnn_is_compared_where_it_ran():
    half = {"dtype": "float16", "ratio": 0.96}
    assert verdicts([row(**half)])[CUDNN] == ("not measured", None)
    ran = [row(**half, cudnn=True), row(**half | {"ratio": 2.0}, cudnn=True, fusion="bn+relu")]
    assert verdicts(ran)[CUDNN] == ("met", pytest.approx(0.96))
    worse = row(**half | {"ratio": 0.94}, cudnn=True, **{"pass": "inference"})
    assert verdicts([*ran, worse])[CUDNN] == ("missed", pytest.approx(0.94))
    contiguous = row(**half | {"ratio": 0.1}, cudnn=True, layout="contiguous")
    assert verdicts([*ran, contiguous])[CUDNN] == ("met", pytest.approx(0.96))


def test_the_worst_of_few_channels_decides():
    rows = [
        row(case="20x6x65536", dtype="float16", layout="contiguous", ratio=6.0),
        row(case="8x16x64x64x64", layout="contiguous", ratio=4.0),
    ]
    assert verdicts(rows[:1])[SMALL] == ("met", 6.0)
    assert verdicts(rows)[SMALL] == ("missed", 4.0)


def test_a_network_is_faster_if_the_interval_leaves_no_doubt():
    found = {"ratio": 1.1, "interval": [1.01, 1.2], "ours_peak": 9e9, "eager_peak": 10e9}
    assert verdicts([], found)[STEP] == ("met", 1.1)
    assert verdicts([], found)[MEMORY] == ("met", pytest.approx(0.9))
    doubtful = found | {"interval": [0.99, 1.2], "ours_peak": 10e9}
    assert verdicts([], doubtful)[STEP] == ("missed", 1.1)
    assert verdicts([], doubtful)[MEMORY] == ("missed", 1.0)
    assert verdicts([], found | {"ours_peak": 0, "eager_peak": 0})[MEMORY][0] == "not measured"


def test_the_fastest_copy_of_a_large_tensor():
    bytes_of = 2 * 256 * 64 * 112 * 112
    rows = [row(copy_us=400.0), row(copy_us=300.0, fusion="bn+relu"), row(case="9x9", copy_us=1e-9)]
    speed, case = targets.copy_speed(rows)
    assert speed == pytest.approx(2 * bytes_of / 300e-6)
    assert case == "256x64x112x112 bfloat16"
    assert targets.copy_speed(rows[2:]) is None
