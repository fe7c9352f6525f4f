import pytest

from batchnorm.errors import ArgumentError
from batchnorm.figures import LOOKS
from batchnorm.lab import plots

FOUR = ("a", "b", "c", "d")
FIVE = (*FOUR, "e")


def along(names):
    return {name: ([1.0, 2.0], [[place, place + 1.0]]) for place, name in enumerate(names, 1)}


def curves(names):
    return plots.curves(along(names), xlabel="x", ylabel="y")


def panels(names):
    return plots.panels({"panel": along(names)}, xlabel="x", ylabel="y")


def by_layer(names):
    series = {name: [[place, place + 1.0]] for place, name in enumerate(names, 1)}
    return plots.by_layer(series, xlabel="x", ylabel="y")


def sweep(names):
    rates = {name: {0.1: [place, None], 1.0: [place, 2.0]} for place, name in enumerate(names, 1)}
    return plots.sweep(
        {"panel": rates}, horizon=9.0, horizon_label="never", chosen={}, xlabel="x", ylabel="y"
    )


KINDS = pytest.mark.parametrize("draw", [curves, panels, by_layer, sweep])


@KINDS
def test_as_many_series_as_there_are_looks_are_all_drawn_and_each_has_its_own(draw):
    axes = draw(FOUR).axes[0]
    handles, names = axes.get_legend_handles_labels()
    assert tuple(names) == FOUR
    assert [line.get_color() for line in handles] == [look.colour for look in LOOKS]


@KINDS
def test_a_series_for_which_there_is_no_look_is_refused(draw):
    with pytest.raises(ArgumentError, match=r"at most 4 series, .*; got 5: a, b, c, d, e\."):
        draw(FIVE)


def test_a_series_looks_as_in_another_figure_of_the_page():
    axes = plots.curves(along(["c"]), xlabel="x", ylabel="y", like=FOUR).axes[0]
    assert axes.get_lines()[0].get_color() == LOOKS[2].colour


def test_what_was_predicted_is_named_once():
    lines = {"a": [1.0, 2.0], "b": [2.0, 3.0]}
    axes = plots.curves(along(FOUR), xlabel="x", ylabel="y", lines=lines).axes[0]
    assert axes.get_legend_handles_labels()[1] == [*FOUR, "predicted"]


@pytest.mark.parametrize(("level", "inside"), [(8.0, True), (3.0, True)])
def test_a_level_above_all_series_lies_within_the_axes(level, inside):
    axes = plots.curves(along(FOUR), xlabel="x", ylabel="y", level=level).axes[0]
    low, high = axes.get_ylim()
    assert (level < high - 0.08 * (high - low)) == inside


def test_equal_marks_of_a_sweep_stand_side_by_side():
    same = {name: {0.1: [2.0]} for name in FOUR}
    figure = plots.sweep(
        {"panel": same}, horizon=9.0, horizon_label="", chosen={}, xlabel="x", ylabel="y"
    )
    marks = [line for line in figure.axes[0].lines if line.get_marker() in "soD^"]
    assert len({float(line.get_xdata()[0]) for line in marks}) == len(FOUR)


def test_quantiles_of_more_series_than_looks_are_refused():
    one = ([1.0, 2.0], {"50%": [[1.0, 2.0]]})
    shown = plots.quantile_panels(dict.fromkeys(FOUR, one), xlabel="x", ylabel="y")
    assert [axes.get_title(loc="left") or axes.get_title() for axes in shown.axes] == list(FOUR)
    with pytest.raises(ArgumentError, match="got 5"):
        plots.quantile_panels(dict.fromkeys(FIVE, one), xlabel="x", ylabel="y")


@pytest.mark.parametrize(
    ("values", "left", "right"),
    [([1.0, 4.0], 0.0, 4.2), ([-1.0, 4.0], -1.25, 4.25), ([-3.0, -1.0], -3.15, 0.15)],
)
def test_strips_show_every_mark_and_zero(values, left, right):
    axes = plots.strips({"a": values, "b": [values[0]]}, xlabel="x").axes[0]
    assert axes.get_xlim() == pytest.approx((left, right))
