import errno
import json
import math

import pytest

from batchnorm.bench import merge, page, plots, report, results
from batchnorm.bench.environment import environment
from batchnorm.bench.results import geomeans, prepare, refused, save, summarise, worst
from batchnorm.errors import ArgumentError


def row(ratio, *, case="64x10", mode="forward", fusion="bn", peer="torch eager", **others):
    """A row as the first process tells it; its rounds scatter by a tenth."""
    found = ratio and {
        "ratios": [ratio, ratio / 1.1, ratio * 1.1],
        "bandwidth_fraction": 0.756,
        **dict.fromkeys(("ours_us", "peer_us", "copy_us", "faults"), 1.0),
    }
    return {
        "case": case,
        "dtype": "float32",
        "layout": "dense",
        "pass": mode,
        "fusion": fusion,
        "peer": peer,
        **(found or {}),
        "allocator": "default",
        "status": "ok" if ratio else "wrong result",
        "error": 1e-7,
        "error_bound": 4e-6,
        "error_where": "dx",
        "peer_error": 2e-7,
        **others,
    }


def size(bytes_, mode="forward", allocator="default"):
    us = {"batchnorm": 1.0 + bytes_ / 1e4, "torch eager": 9.0, "copy": 0.5}
    return {
        "case": "4x64x1x1",
        "bytes": bytes_,
        "pass": mode,
        "allocator": allocator,
        "status": "ok",
        "us": us,
    }


def events(rows, sizes=(), notes=()):
    return [
        {"event": "environment", **environment("cpu", 0), "cache_bytes": {"L2": 1 << 20}},
        {"event": "load", "when": "before", "others": 0.0123456789},
        {"event": "load", "when": "during", "others": 0.25},
        {"event": "kernels", "native": True},
        *({"event": "row", **r} for r in rows),
        *({"event": "size", **s} for s in sizes),
        *({"event": "note", "text": text} for text in notes),
    ]


ROWS = [
    row(2.0),
    row(8.0, case="64x256"),
    row(None, case="1x1", error=0.5),
    row(0.5, peer="torch.compile"),
    row(3.0, allocator="no page faults"),
    row(0.9, mode="inference", fusion="bn+relu"),
]


def test_geometric_means_are_of_their_group_and_of_what_was_right():
    means = {tuple(m[key] for key in results.GROUP): m for m in geomeans(merge.rows(ROWS))}
    assert len(means) == 4
    first = means["forward", "bn", "torch eager", "default"]
    assert first["ratio"] == pytest.approx(math.sqrt(2.0 * 8.0))
    assert (first["cases"], first["refused"], first["noisy"]) == (2, 1, 0)
    assert first["interval"] is None  # of one process
    assert means["forward", "bn", "torch.compile", "default"]["ratio"] == 0.5
    assert means["forward", "bn", "torch eager", "no page faults"]["ratio"] == 3.0
    (nothing,) = geomeans(merge.rows([row(None)]))
    assert (nothing["ratio"], nothing["cases"], nothing["refused"]) == (None, 0, 1)


def test_the_interval_of_a_geometric_mean_is_of_the_processes_own():
    # Cases that go up and down together move their mean; cases that do not, do not.
    together = [row(r, case=c) for r, c in ((2, "1x2"), (4, "1x3"), (8, "1x2"), (16, "1x3"))]
    opposite = [row(r, case=c) for r, c in ((2, "1x2"), (16, "1x3"), (8, "1x2"), (4, "1x3"))]
    (moved,), (kept,) = (geomeans(merge.rows(rows)) for rows in (together, opposite))
    assert moved["ratio"] == kept["ratio"] == pytest.approx(math.sqrt(32), rel=1e-4)
    low, high = moved["interval"]
    assert low < math.sqrt(8) < math.sqrt(128) < high
    assert kept["interval"] == pytest.approx([kept["ratio"]] * 2, rel=1e-4)


def test_the_part_of_a_copys_speed_counts_each_case_once():
    rows = merge.rows([row(2.0), row(2.0, peer="torch.compile"),
                       row(2.0, case="64x256", bandwidth_fraction=0.189)])  # fmt: skip
    (copy,) = results.copies(rows)
    assert (copy["fraction"], copy["cases"]) == (pytest.approx(0.378), 2)


def test_the_worst_of_each_pass():
    rows = merge.rows(ROWS)
    assert [(r["pass"], r["ratio"]) for r in worst(rows)] == [
        ("forward", pytest.approx(0.5)),
        ("inference", pytest.approx(0.9)),
    ]
    assert worst(merge.rows([row(None)])) == []


def test_what_is_behind_is_so_beyond_doubt_and_as_it_is_printed():
    rows = merge.rows([row(r, case=f"1x{i}") for i, r in enumerate((0.8, 0.95, 0.7, 2.0, None))])
    assert [r["ratio"] for r in results.behind(rows)] == pytest.approx([0.7, 0.8])
    assert results.standing(0.99, 0.9951) == ""


def test_the_summary_is_strict_json_with_short_numbers_and_each_note_once():
    rows = [row(1.23456789), row(None, case="1x1", error=math.nan)]
    content = summarise("quick", events(rows, [size(1024)], ["a", "b", "a"]))
    assert content["notes"] == ["a", "b"]
    assert content["load"] == {"before": [0.012346], "during": [0.25]}
    assert content["kernels"] == {"native": 1, "others": 0}
    assert [r["ratio"] for r in content["rows"]] == [1.2346, None]
    assert content["rows"][1]["error"] is None
    assert "event" not in content["rows"][0]
    assert content["sizes"][0]["bytes"] == 1024
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [r["status"] for r in refused(content)] == ["wrong result"]
    wrong_size = {**size(1024), "status": "wrong result", "us": None}
    assert len(refused(summarise("quick", events([], [wrong_size])))) == 1


def test_the_file_has_the_figures_beside_it(tmp_path):
    sizes = [
        size(1024 << k, mode, allocator)
        for allocator in ("default", "no page faults")
        for mode in ("forward", "forward+backward")
        for k in range(14)
    ]
    content = summarise(
        "full",
        events(ROWS, sizes, ["The machine was busy."]),
        command="batchnorm bench --filter 64x10",
        filter="64x10",
    )
    path = tmp_path / "new" / "cpu.json"
    prepare(path)
    written = save(content, path)
    names = [
        "cpu.json",
        "cpu.md",
        "cpu-ratios-default.svg",
        "cpu-ratios-no-page-faults.svg",
        "cpu-sizes.svg",
    ]
    assert [p.name for p in written] == names
    assert json.loads(path.read_text()) == content
    text, ratios, without, by_size = (p.read_text() for p in written[1:])
    for word in ("forward+backward", "torch eager", "torch.compile", "64x256 float32 dense"):
        assert word in ratios
    # Only what was measured is in the legend, and a wrong result is in no figure.
    assert "torch.compile" not in without
    assert "1x1 float32" not in ratios
    for word in ("time per KB of the tensor (ns)", "16 KB", "L2", "copy", "no page faults"):
        assert word in by_size
    for name in names[2:]:
        assert f"]({name})" in text
    assert "Written by `batchnorm bench --filter 64x10 --json FILE`" in text
    for lines in (report.summary(content), report.details(content)):
        assert "\n".join(line.plain for line in lines) in text
    order = [
        "# Batch norm beside torch: the full suite on cpu, only 64x10",
        "> **The machine was busy.**",
        "geometric mean",
        "Worst forward",
        "![",
        "## Where a peer is ahead",
        "## Every case",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert "used 1% before, at most 25% of the processors' time while measuring" in text
    assert [line for line in text.splitlines() if line.startswith("| 64x10 float32")] == [
        "| 64x10 float32 dense | forward | bn | default | torch.compile | 0.50 (0.45 to 0.55) |",
        "| 64x10 float32 dense | inference | bn+relu | default | torch eager "
        "| 0.90 (0.82 to 0.99) |",
    ]
    assert save(content, path) == written
    assert written[2].read_text() == ratios


def test_a_file_that_cannot_be_written_is_refused_before_the_measuring(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ArgumentError, match=r"a directory\. Choose another one with --json"):
        prepare(tmp_path / "folder.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match=r"ends in \.json"):
        prepare(tmp_path / "cpu.md")
    (tmp_path / "README.md").write_text("# Something else")
    with pytest.raises(ArgumentError, match=r"README\.md to be a page of results"):
        prepare(tmp_path / "README.json")
    with pytest.raises(ArgumentError, match="Cannot make the directory"):
        prepare(tmp_path / "file" / "cpu.json")
    for text in ("", "[]", '{"schema": 1}'):
        (tmp_path / "package.json").write_text(text)
        with pytest.raises(
            ArgumentError, match=r"package\.json to be results of `batchnorm bench`"
        ):
            prepare(tmp_path / "package.json")
    assert (tmp_path / "package.json").read_text() == text


def test_a_full_disk_is_found_before_the_measuring(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.tempfile, "TemporaryFile", full)
    with pytest.raises(
        ArgumentError, match=r"Cannot write .*cpu\.json \(No space left on device\)"
    ):
        prepare(tmp_path / "cpu.json")


def test_what_was_cut_short_replaces_nothing_and_draws_nothing(tmp_path):
    path = tmp_path / "cpu.json"
    save(summarise("quick", events(ROWS)), path)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    written = save(summarise("quick", events(ROWS[:1]), complete=False), path)
    assert [p.name for p in written] == ["cpu-incomplete.json", "cpu-incomplete.md"]
    assert json.loads(written[0].read_text())["complete"] is False
    assert "> **Interrupted: not all" in written[1].read_text()
    for name, text in before.items():
        assert (tmp_path / name).read_text() == text
    prepare(path)  # both may be written again


def test_the_page_says_what_really_served(monkeypatch):
    content = summarise("quick", events(ROWS))
    assert "| kernels used | the C++ kernels, in every case" in page.page(content, ())
    content["kernels"] = {"native": 0, "others": 27}
    assert "| kernels used | torch's operations, not the C++ kernels" in page.page(content, ())
    content["kernels"] = {"native": 20, "others": 7}
    assert "| torch's operations, in 7 of 27 cases and fusions not the" in page.page(content, ())
    content["environment"] |= {"cores": 2, "threads": 1}
    assert "2 cores, 1 thread;" in page.page(content, ())


def printed(content):
    lines = (*report.details(content), *report.summary(content))
    return [line for text in lines for line in text.plain.split("\n")]


def test_what_is_printed_fits_and_ends_with_what_is_short():
    long = row(12.345, case="32x64x112x112", dtype="bfloat16", layout="channels-last",
               fusion="bn+add+relu", mode="forward+backward")  # fmt: skip
    rows = [long, *(r for r in ROWS if r["allocator"] == "default")]
    twice = [{**r, "allocator": a} for r in rows for a in ("default", "no page faults")]
    text = printed(summarise("full", events([*twice, *twice], (), ["word " * 40])))
    assert max(map(len, text)) <= 80
    first = text.index(next(line for line in text if line.startswith("64x10 float32 dense")))
    assert text[first].split()[-4:] == ["default", "no", "page", "faults"]
    assert text[first + 1].split() == ["eager", "compile", "copy"] * 2
    assert text[first + 2].split() == ["forward", "bn", *("2.00", "0.50", "76%") * 2]
    assert text[first + 4] == "  error 1.0e-07 in dx, at most 4.0e-06 allowed; torch eager 2.0e-07"
    last = text[next(i for i, line in enumerate(text) if line.startswith("geometric mean")) :]
    assert last[1].split() == ["eager", "compile"] * 2
    assert last[2].split() == ["of", "cases", *("1-2", "1") * 2]
    assert last[3].split() == ["forward", "bn", *("4.00", "±0%", "0.50", "±0%") * 2]
    copies = last.index(next(line for line in last if line.startswith("part of a copy's speed")))
    assert last[copies + 2].split() == ["forward", "bn", "76%", "76%"]
    worst_line = last.index("Worst forward: 0.50× torch.compile (0.45 to 0.55):")
    assert last[worst_line + 1] == "  64x10 float32 dense, bn, default"
    assert last[-1] == "2 of our results were wrong: no speed-up for those."


def test_columns_are_apart_with_one_peer_too():
    twice = [row(2.0, allocator=a) for a in ("default", "no page faults")]
    text = printed(summarise("quick", events(twice)))
    headers = [line for line in text if "no page faults" in line and "default" in line]
    assert len(headers) == 3
    for header in headers:
        assert "default  no page faults" in header


@pytest.mark.parametrize(
    ("ratios", "shown", "style"),
    [
        ((1.2, 1.25, 1.21), "1.21", "green"),
        ((0.8, 0.81, 0.82), "0.81", "red"),
        ((0.9, 1.0, 1.1), "1.00", ""),
        ((0.996, 0.9961, 0.9962), "1.00", ""),
        ((0.5, 1.5, 1.3), "~1.30", "dim"),
        ((4.0, 9.0, 8.0), "~8.00", "dim green"),
    ],
)
def test_a_colour_is_a_claim_and_noise_is_marked(ratios, shown, style):
    (merged,) = merge.rows([row(1.0, ratios=list(ratios))])
    assert report._cell(merged) == (shown, style)


@pytest.mark.parametrize(
    ("mean", "cell"),
    [
        ({"ratio": 2.0, "interval": [2.0 / 1.1, 2.2]}, ("2.00 ±10%", "green")),
        ({"ratio": 0.8, "interval": [0.79, 0.81]}, ("0.80 ±1%", "red")),
        ({"ratio": 1.0, "interval": [0.9, 1.1]}, ("1.00 ±11%", "")),
        ({"ratio": 26.75, "interval": [20.0, 40.0]}, ("~26.8 ±41%", "dim")),
        ({"ratio": 126.75, "interval": [2.0, 4000.0]}, ("~127 ±>99%", "dim")),
        ({"ratio": 2.0, "interval": [1.9, 2.1], "noisy": 5}, ("~2.00 ±5%", "dim")),
        ({"ratio": 2.0, "interval": None}, ("~2.00", "dim")),
        ({"ratio": None, "interval": None}, ("-", "")),
    ],
)
def test_a_mean_has_its_interval_or_a_mark(mean, cell):
    assert report._mean({"cases": 9, "noisy": 4, **mean}) == cell


def test_a_wrong_result_is_printed_in_the_place_of_the_ratio():
    text = printed(
        summarise("quick", events([row(None, error=None), row(None, peer="torch.compile")]))
    )
    (line,) = [line for line in text if line.split()[-2:] == ["wrong", "result"]]
    assert line.split() == ["forward", "bn", "-", "wrong", "result"]
    assert "1 of our results were wrong: no speed-up for those." in text
    assert any(line.startswith("  error inf in dx, at most 4.0e-06 allowed") for line in text)
    assert not any("Worst" in line for line in text)


def figure_of(rows, allocator="default"):
    from batchnorm.figures import style

    with style():
        figure = plots.ratios(merge.rows(rows), allocator)
        figure.draw_without_rendering()
    return figure


def test_ticks_are_as_fine_as_there_is_room_for():
    def labels(*values):
        axes = figure_of([row(v, case=f"1x{i}") for i, v in enumerate(values)]).axes[0]
        low, high = axes.get_xlim()
        return [t.get_text() for t in axes.get_xticklabels() if low < t.get_position()[0] < high]

    assert labels(0.8, 4.0) == ["1", "2"]
    assert labels(0.5, 9.0) == ["0.5", "1", "2", "5", "10"]
    assert labels(0.5, 300.0) == ["1", "3", "10", "30", "100", "300"]
    assert labels(0.5, 900.0) == ["1", "10", "100", "1000"]


def test_figures_of_all_allocators_have_one_axis():
    rows = [row(2.0), row(20.0, allocator="no page faults")]
    limits = [figure_of(rows, name).axes[0].get_xlim() for name in ("default", "no page faults")]
    assert limits[0] == limits[1]
    assert limits[0][0] < 1 < 20 < limits[0][1]


def test_cases_come_by_layout_and_dtype_from_small_to_large():
    def case(name, layout, dtype="float32"):
        return row(2.0, case=name, layout=layout, dtype=dtype)

    rows = [case("4x4", "dense"), case("9x9", "contiguous"), case("2x2", "dense", "bfloat16"),
            case("8x8", "contiguous"), case("2x2", "dense")]  # fmt: skip
    assert plots.ordered(merge.rows(rows)) == [
        "2x2 float32 dense",
        "4x4 float32 dense",
        "2x2 bfloat16 dense",
        "8x8 float32 contiguous",
        "9x9 float32 contiguous",
    ]
