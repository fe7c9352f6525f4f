import itertools
import json
import math
import re
import shutil
import statistics

import pytest

import lab_tiny
from batchnorm import figures, lab
from batchnorm.errors import ArgumentError, InputError
from batchnorm.lab import plots
from batchnorm.lab.experiments import convergence
from web_page import Page

FIGURES = {"accuracy", "sweep", "inputs", "one-input", "gradients", "time"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "EXPERIMENT", lab_tiny.EXPERIMENT)
        lab.run("convergence", directory, profile="tiny", jobs=1)
    return directory


@pytest.fixture
def copy(done, tmp_path):
    """Return a directory with results.json and nothing else."""
    shutil.copy(done / "results.json", tmp_path)
    return tmp_path


def content(directory):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (directory / "results.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def test_results_hold_what_is_needed_to_judge_and_to_repeat(done):
    found = content(done)
    assert found["seeds"] == {"learning-rate sweep": [1_000_000], "evaluation": [0, 1]}
    assert found["settings"]["rates"] == [0.3, 1.0, 3.0]
    assert found["command"] == (
        "batchnorm lab run convergence --profile tiny --data digits --seeds 2"
    )
    assert found["data"]["train_rows"] == 1294
    assert len(found["data"]["fingerprint"]) == 64
    for name in ("batchnorm", "python", "torch", "numpy", "scikit-learn", "platform", "device"):
        assert found["environment"][name]
    assert len(found["runs"]) == 10
    # The verdict follows from the curves that stand beside it.
    reached: dict[str, list] = {"plain": [], "BatchNorm": []}
    for run in found["runs"]:
        if run["trial"]["stage"] == "evaluation":
            pairs = zip(run["measured"]["step"], run["measured"]["accuracy"], strict=True)
            reached[run["trial"]["arm"]].append(next((s for s, a in pairs if a >= 0.9), 200))
    differences = [a - b for a, b in zip(reached["plain"], reached["BatchNorm"], strict=True)]
    assert found["findings"]["verdict"]["differences"] == differences
    assert found["findings"]["verdict"]["mean"] == statistics.fmean(differences)


def test_report_needs_nothing_from_outside(done):
    html = (done / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.lang == "en"
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    assert all(target.startswith("#") for target in page.targets)
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert "@import" not in html
    assert "http" not in html
    assert "//" not in re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    assert all(inner.startswith("#") for inner in re.findall(r"url\((.*?)\)", html))


def test_report_says_what_was_found(done):
    page = Page((done / "report.html").read_text(encoding="utf-8"))
    found = content(done)
    text = " ".join(page.text.split())
    sayings = [
        found["experiment"]["claim"],
        found["experiment"]["source"],
        found["findings"]["verdict"]["outcome"].capitalize(),
        found["findings"]["verdict"]["sentence"],
        found["findings"]["summary"],
        *found["findings"]["recipe"],
        *found["findings"]["caveats"],
        *found["findings"]["not_shown"],
        *(cell for row in found["findings"]["table"]["rows"] for cell in row),
        found["command"],
        found["data"]["fingerprint"],
        found["environment"]["torch"],
        "1294 training and 503 test rows of shape 8 × 8, 10 classes",
        "One mean and one standard deviation, of all training inputs together",
        "2 seeds are few",
    ]
    for saying in sayings:
        assert saying in text
    assert len(page.ids) == len(set(page.ids))


def test_figures_are_text_in_the_page_and_files_beside_it(done):
    html = (done / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == html.count("<figcaption>") == len(FIGURES)
    drawn = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", html))
    for label in ("training step", "test accuracy", "learning rate", "layer", "milliseconds"):
        assert label in drawn
    files = {path.name for path in (done / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    assert (done / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    alone = (done / "figures" / "accuracy.svg").read_text()
    assert alone.startswith("<?xml")
    # On a page of any colour: its own white card, a little larger than the figure.
    x, y, width, height = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', alone).groups()
    assert f'<rect x="{x}" y="{y}" width="{width}" height="{height}"' in alone
    assert "fill: #ffffff" not in html
    assert "not reached in 200 steps" in drawn
    assert "85%" in drawn


def test_report_is_rebuilt_byte_for_byte_from_results_alone(done, copy):
    assert lab.write_report(copy / "results.json") == copy / "report.html"
    assert lab.write_report(copy) == copy / "report.html"
    assert (copy / "report.html").read_bytes() == (done / "report.html").read_bytes()
    for path in (done / "figures").iterdir():
        assert (copy / "figures" / path.name).read_bytes() == path.read_bytes()


def test_report_shows_the_verdict_that_results_hold(copy):
    found = content(copy)
    found["findings"]["verdict"]["outcome"] = "contradicted"
    found["findings"]["caveats"] = ["<b>Not</b> markup & not lost"]
    (copy / "results.json").write_text(json.dumps(found), encoding="utf-8")
    html = lab.write_report(copy).read_text(encoding="utf-8")
    assert "<strong>✗ Contradicted</strong>" in html
    assert "&lt;b&gt;Not&lt;/b&gt; markup &amp; not lost" in html


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not read as such"),
        ("[]", "does not read as such"),
        ('{"schema": 2}', "does not read as such"),
        ('{"schema": 99, "environment": {"batchnorm": "9.0"}}', "expected schema 2; got 99"),
        ('{"schema": 2, "experiment": {"name": "gone"}}', "no experiment called 'gone'"),
    ],
)
def test_results_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises((InputError, ArgumentError), match=message):
        lab.write_report(tmp_path)


def test_a_directory_without_results_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="same run command again"):
        lab.write_report(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "nope"}, "Expected one of: affine-only, convergence, "),
        ({"name": "Convergance"}, "Did you mean 'convergence'"),
        ({"profile": "nope"}, "Expected one of: quick, full"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"jobs": -2}, "jobs must be at least 1"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(ArgumentError, match=message):
        lab.run(**{"name": "convergence", "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_summary_leaves_out_what_is_not_there():
    low, middle, high = plots.summary([[1, None, None], [3, 5, None], [8, 7, None]])
    assert (low[:2], middle[:2], high[:2]) == ([1, 5], [3, 6], [8, 7])
    assert all(math.isnan(column[2]) for column in (low, middle, high))


def test_figures_can_be_told_apart_without_colour():
    assert len({str(look.dash) for look in figures.LOOKS}) == len(figures.LOOKS)
    assert len({look.mark for look in figures.LOOKS}) == len(figures.LOOKS)


def test_censored_runs_are_open_marks_at_the_horizon():
    figure = plots.sweep(
        {"panel": {"plain": {0.1: [None, 50], 1.0: [20, 30]}, "other": {0.1: [40], 1.0: [20]}}},
        horizon=300,
        horizon_label="never",
        chosen={("panel", "plain"): 1.0},
        xlabel="",
        ylabel="",
    )
    lines = figure.axes[0].get_lines()
    marks = [line for line in lines if line.get_marker() == "s" and len(line.get_xdata()) == 1]
    assert [(line.get_ydata()[0], line.get_markerfacecolor() == "none") for line in marks] == [
        (300, True),
        (50, False),
        (20, False),
        (30, False),
    ]
    assert list(lines[0].get_ydata()) == [175, 25]
    (ring,) = [line for line in lines if line.get_markersize() == 15]
    assert [text.get_text() for text in figure.axes[0].texts] == ["never"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (1.0, 25)


def test_labels_of_lines_that_meet_are_nudged_apart():
    flat = {name: [[0.0, value]] for name, value in (("low", -0.01), ("mid", 0), ("high", 0.01))}
    figure = plots.quantile_panels({"panel": ([0, 1], flat)}, xlabel="", ylabel="")
    wide = {"panel": ([0, 1], {"low": [[0, -9]], "mid": [[0, 0]], "high": [[0, 9]]})}
    figures = (
        figure,
        plots.quantile_panels({**wide, "flat": ([0, 1], flat)}, xlabel="", ylabel=""),
    )
    for drawn in figures:
        drawn.draw_without_rendering()
        for axes in drawn.axes:
            boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
            for below, above in itertools.pairwise(boxes):
                assert (above.y0 + above.y1 - below.y0 - below.y1) / 2 * 72 / drawn.dpi > 9.9
    # Labels with room enough stay at the ends of their lines.
    assert [text.get_position()[1] for text in figures[1].axes[0].texts] == pytest.approx([0] * 3)


def test_a_default_directory_says_what_differs():
    def name(profile="quick", seeds=None, data="digits"):
        return lab.default_directory("convergence", profile=profile, seeds=seeds, data=data)

    assert name() == name(seeds=8) == "convergence"
    assert name(profile="full") == "convergence-full"
    assert name(data="a/b/wine.npz", seeds=3) == "convergence-wine-3-seeds"
    assert name(profile="full", data="wine.npz", seeds=1) == "convergence-full-wine-1-seed"
