import json
import math

import pytest

from batchnorm.bench import plots, report, results
from batchnorm.bench.environment import environment
from batchnorm.bench.results import geomeans, prepare, refused, save, summarise, worst
from batchnorm.errors import ArgumentError


def row(ratio, *, case="64x10", mode="forward", fusion="bn", peer="torch eager", **others):
    return {
        "case": case,
        "dtype": "float32",
        "layout": "dense",
        "pass": mode,
        "fusion": fusion,
        "peer": peer,
        "ratio": ratio,
        "interval": ratio and [ratio / 2, ratio * 2],
        "bandwidth_fraction": ratio and 0.756,
        "allocator": "default",
        "status": "wrong result" if ratio is None else "ok",
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
    means = {tuple(m[key] for key in results.GROUP): m for m in geomeans(ROWS)}
    assert len(means) == 4
    first = means["forward", "bn", "torch eager", "default"]
    assert first["ratio"] == pytest.approx(math.sqrt(2.0 * 8.0))
    assert (first["cases"], first["refused"]) == (2, 1)
    assert means["forward", "bn", "torch.compile", "default"]["ratio"] == 0.5
    assert means["forward", "bn", "torch eager", "no page faults"]["ratio"] == 3.0
    (nothing,) = geomeans([row(None)])
    assert (nothing["ratio"], nothing["cases"], nothing["refused"]) == (None, 0, 1)


def test_the_worst_of_each_pass():
    assert [(r["pass"], r["ratio"]) for r in worst(ROWS)] == [("forward", 0.5), ("inference", 0.9)]
    assert worst([row(None)]) == []


def test_the_summary_is_strict_json_with_short_numbers_and_each_note_once():
    rows = [row(1.23456789), row(None, error=math.nan)]
    content = summarise("quick", events(rows, [size(1024)], ["a", "b", "a"]))
    assert content["notes"] == ["a", "b"]
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
    content = summarise("full", events(ROWS, sizes), command="batchnorm bench --filter 64x10")
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
    assert "\n".join(printed(content)) in text
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


def printed(content):
    return [line for text in report.lines(content) for line in text.plain.split("\n")]


def test_what_is_printed_fits_and_ends_with_what_is_short():
    long = row(12.345, case="32x64x112x112", dtype="bfloat16", layout="channels-last",
               fusion="bn+add+relu", mode="forward+backward")  # fmt: skip
    rows = [long, *(r for r in ROWS if r["allocator"] == "default")]
    twice = [{**r, "allocator": a} for r in rows for a in ("default", "no page faults")]
    text = printed(summarise("full", events(twice, (), ["word " * 40])))
    assert max(map(len, text)) <= 80
    first = text.index(next(line for line in text if line.startswith("64x10 float32 dense")))
    assert text[first].split()[-4:] == ["default", "no", "page", "faults"]
    assert text[first + 1].split() == ["eager", "compile", "copy"] * 2
    assert text[first + 2].split() == ["forward", "bn", *("2.00", "0.50", "76%") * 2]
    assert text[first + 4] == "  error 1.0e-07 in dx, at most 4.0e-06 allowed; torch eager 2.0e-07"
    last = text[next(i for i, line in enumerate(text) if line.startswith("geometric mean")) :]
    assert last[1].split() == ["eager", "compile"] * 2
    assert last[2].split() == ["forward", "bn", *("4.00", "0.50") * 2]
    worst_line = last.index("Worst forward: 0.50× torch.compile (0.25 to 1.00):")
    assert last[worst_line + 1] == "  64x10 float32 dense, bn, default"
    assert last[-1] == "2 of our results were wrong: no speed-up for those."


def test_a_wrong_result_is_printed_in_the_place_of_the_ratio():
    text = printed(
        summarise("quick", events([row(None, error=None), row(None, peer="torch.compile")]))
    )
    (line,) = [line for line in text if "wrong result" in line]
    assert line.split() == ["forward", "bn", "-", "wrong", "result"]
    assert "1 of our results were wrong: no speed-up for those." in text
    assert any(line.startswith("  error inf in dx, at most 4.0e-06 allowed") for line in text)
    assert not any("Worst" in line for line in text)


def test_ticks_between_decades_only_where_there_is_room():
    from batchnorm.lab.plots import style

    def labels(*values):
        with style():
            figure = plots.ratios([row(v, case=str(v)) for v in values], "default")
            figure.draw_without_rendering()
            axes = figure.axes[0]
            low, high = axes.get_xlim()
            return [
                t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high
            ]

    assert labels(0.8, 4.0) == ["1", "3"]
    assert labels(0.5, 900.0) == ["1", "10", "100", "1000"]
