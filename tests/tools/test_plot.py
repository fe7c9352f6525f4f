"""The picture of the drift: every layer's values where they belong."""

import math
import sys

import pytest

from batchnorm import ArgumentError, BatchNormError, MissingDependencyError
from batchnorm.tools import plot
from batchnorm.tools.findings import Diagnosis, Finding, Gap, LayerReport


def diagnosis(count=6, *, attributed=True, worst=()):
    layers = tuple(
        LayerReport(
            f"layer{n}.bn",
            "BatchNorm2d",
            64,
            mean_drift=0.01 * (n + 1),
            var_drift=0.3 / (n + 1),
            gap=0.1 * n if attributed else None,
            share=-0.01 * n if attributed else None,
        )
        for n in range(count)
    )
    findings = tuple(Finding("BN101", severity, layers[n].name, "") for n, severity in worst)
    return Diagnosis(findings, layers, Gap(0.8, 0.02, None, 4) if attributed else None)


def figure(given):
    from batchnorm.figures import style

    with style():
        return plot._figure(given)


def marks(axes, shape):
    """Row, value and whether it is filled, of marks of one shape."""
    return {
        int(line.get_ydata()[0]): (
            float(line.get_xdata()[0]),
            line.get_markerfacecolor() != "white",
        )
        for line in axes.lines
        if line.get_marker() == shape and len(line.get_xdata()) == 1
    }


def test_values_are_where_they_belong():
    given = diagnosis(worst=((1, "error"), (4, "warning"), (5, "info")))
    left, right = figure(given).axes
    for axes, shape, get in (
        (left, "o", lambda layer: layer.mean_drift),
        (left, "s", lambda layer: layer.var_drift),
        (right, "D", lambda layer: layer.gap),
        (right, "^", lambda layer: 0.8 * layer.share),  # in the gap's unit
    ):
        assert marks(axes, shape) == {
            row: (pytest.approx(get(layer)), row in (1, 4))
            for row, layer in enumerate(given.layers)
        }
    assert left.get_xscale() == "log"
    # Beside the whole gap, which is not beyond the edge.
    (whole,) = [line for line in right.lines if line.get_label() == "the whole gap"]
    assert list(whole.get_xdata()) == [0.8, 0.8]
    assert right.get_xlim()[1] > 0.8
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels[:2] == ["layer0.bn", "E  layer1.bn"]
    assert labels[4:] == ["W  layer4.bn", "layer5.bn"]
    # From the first layer at the top to the last.
    assert left.get_ylim() == (5.5, -0.5)


def test_an_error_and_a_warning_differ_without_colour():
    left, _ = figure(diagnosis(worst=((1, "error"), (4, "warning")))).axes
    dots = [line for line in left.lines if len(line.get_xdata()) == 1]
    sizes = {int(dot.get_ydata()[0]): dot.get_markersize() for dot in dots}
    assert sizes[1] > sizes[4] > sizes[0]


def test_what_is_beyond_the_edges_is_an_arrow_and_what_is_unknown_is_not_there():
    layers = (
        LayerReport("a", "BatchNorm", 3, mean_drift=0.0, var_drift=math.inf),
        LayerReport("b", "BatchNorm", 3, mean_drift=math.nan, var_drift=0.5),
        LayerReport("c", "BatchNorm", 3),
    )
    (axes,) = figure(Diagnosis((), layers)).axes
    low, high = axes.get_xlim()
    assert marks(axes, "<") == {0: (pytest.approx(low), False)}
    assert marks(axes, ">") == {0: (pytest.approx(high), False)}
    assert marks(axes, "s") == {1: (0.5, False)}
    assert marks(axes, "o") == {}


def test_what_long_names_share_is_left_out():
    names = [f"backbone.encoder.stages.{n}.norm" for n in range(3)]
    layers = tuple(LayerReport(name, "BatchNorm", 3, mean_drift=0.1) for name in names)
    (axes,) = figure(Diagnosis((), layers)).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["…0.norm", "…1.norm", "…2.norm"]


@pytest.mark.parametrize(
    ("count", "suffix"), [(1, ".png"), (2, ".pdf"), (1, ".svg"), (150, ".svg")]
)
def test_files_of_every_kind(tmp_path, count, suffix):
    path = tmp_path / f"drift{suffix}"
    plot.drift(diagnosis(count), path)
    start = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix]
    content = path.read_bytes()
    assert content.startswith(start)
    plot.drift(diagnosis(count), path)
    assert path.read_bytes() == content  # no date in it
    if suffix == ".svg":
        assert content.count(b">layer") == count  # text stays text


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="drawing needs `diagnose`"):
        plot.drift(Diagnosis((), (LayerReport("a", "batch norm", 3),)), tmp_path / "a.svg")
    with pytest.raises(ArgumentError, match=r"\.svg, \.png, \.pdf"):
        plot.drift(diagnosis(), tmp_path / "a.jpg")
    with pytest.raises(ArgumentError, match="make it first"):
        plot.drift(diagnosis(), tmp_path / "nowhere" / "a.svg")
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(BatchNormError, match="expected to write"):
        plot.drift(diagnosis(), tmp_path / "taken.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"\[tools\]"):
        plot.drift(diagnosis(), tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("gap", "title"),
    [
        (Gap(0.5, math.nan, None, 1), "0.5"),
        (Gap(0.5, 0.01, 0.2, 4), "0.5 ± 0.01, 0.2 with exact statistics"),
        (Gap(math.nan, math.nan, 0.2, 4), "NaN or infinity, 0.2 with exact statistics"),
        (Gap(math.inf, math.nan, math.nan, 4), "NaN or infinity"),
    ],
)
def test_gaps_that_are_no_numbers(gap, title):
    drawn = figure(Diagnosis((), (LayerReport("a", "BatchNorm", 3, mean_drift=0.1, gap=0.2),), gap))
    assert drawn.get_suptitle() == f"Gap between train() and eval(): {title}"
    legend = [text.get_text() for text in drawn.axes[1].get_legend().get_texts()]
    assert ("the whole gap" in legend) == math.isfinite(gap.value)
