"""What is drawn stands where the numbers say."""

import re
from itertools import pairwise

import pytest

from figure_page import START, choose, run, slide

pytestmark = pytest.mark.slow  # a browser starts

REACH, EDGE = 12, 10


def bars(page, part):
    """Bars as (left, right, height), in units of the axis and pixels."""
    width = float(page.locator(".flow").get_attribute("width"))
    unit = (width - 2 * EDGE) / (2 * REACH)
    rectangles = page.locator(f".flow .{part} .bar").evaluate_all(
        "all => all.map(bar => ['x', 'width', 'height', 'y'].map(n => +bar.getAttribute(n)))"
    )
    for x, wide, high, _ in rectangles:  # half a pixel at each side is the gap between two bars
        yield (x - 0.5 - EDGE) / unit - REACH, (x + wide + 0.5 - EDGE) / unit - REACH, high


@pytest.mark.parametrize(
    "settings",
    [{}, {"size": 2}, {"size": 256, "gamma": -1.5, "beta": 2}, {"updates": 0, "offset": -6}],
    ids=str,
)
def test_bars_are_as_high_as_there_are_values(page, settings):
    for name, value in ({**START, **settings}).items():
        if name not in ("mode", "seed"):
            slide(page, name, value)
    choose(page, "eval")
    found = run(page, **settings, mode="eval")
    for part in ("input", "output"):
        counts, heights = [], []
        for left, right, height in bars(page, part):
            middle, half = (left + right) / 2, (right - left) / 2
            # The edges are drawn to a hundredth of a pixel, the widths are powers of two.
            half = round(half * 16) / 16
            middle = round(middle / (2 * half)) * 2 * half
            counts.append(sum(middle - half <= value < middle + half for value in found[part]))
            heights.append(height)
        assert all(counts)
        shown = [value for value in found[part] if abs(value) <= REACH]
        assert len(shown) <= sum(counts) <= len(found[part])
        tallest = max(heights)
        assert [height / tallest for height in heights] == pytest.approx(
            [count / max(counts) for count in counts], abs=2e-4
        )
    page.get_by_role("button", name="Reset").click()


def test_values_beyond_the_axis_are_counted(page):
    slide(page, "spread", 3)
    slide(page, "offset", 6)
    slide(page, "gamma", 2)
    slide(page, "updates", 0)
    choose(page, "eval")
    found = run(page, spread=3, offset=6, gamma=2, updates=0, mode="eval")
    for part, at in (("input", 0), ("output", 1)):
        above = sum(value > REACH for value in found[part])
        shown = page.locator(".flow .beyond").nth(at).text_content()
        assert shown == (f"{above} beyond ▸" if above else "")
    assert above > 20
    page.get_by_role("button", name="Reset").click()


@pytest.mark.parametrize("updates", [0, 1, 37, 100])
def test_the_paths_are_the_running_statistics(page, updates):
    slide(page, "updates", updates)
    found = run(page)
    for index, (values, truth) in enumerate([(found["means"], 5), (found["variances"], 4)]):
        track = page.locator(".track").nth(index)
        written = [
            re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get_attribute("d"))
            for path in track.locator("path.running").all()
        ]
        future, past = [[(float(x), float(y)) for x, y in points] for points in written]
        assert (len(past), len(future)) == (updates + 1, 101 - updates)
        assert past[-1] == future[0]
        drawn = past + future[1:]
        line = float(re.search(r" ([\d.]+)L", track.locator(".truth").get_attribute("d"))[1])
        unit = (drawn[0][1] - line) / (values[0] - truth)  # pixels for one, downwards
        assert unit < 0
        heights = [line + unit * (value - truth) for value in values]
        assert [y for _, y in drawn] == pytest.approx(heights, abs=0.05)
        steps = [after[0] - before[0] for before, after in pairwise(drawn)]
        assert steps == pytest.approx([steps[0]] * 100, abs=0.02)
        now = track.locator("circle")
        assert float(now.get_attribute("cx")) == pytest.approx(drawn[updates][0], abs=0.01)
        assert float(now.get_attribute("cy")) == pytest.approx(drawn[updates][1], abs=0.01)
        label = f"{values[updates]:.2f}".replace("-0.00", "0.00")
        assert track.locator("text.value").text_content() == label
        assert f"after {updates} updates: {label}; truth: {truth}.00" in track.get_attribute(
            "aria-label"
        )
    page.get_by_role("button", name="Reset").click()


def test_each_value_is_led_to_its_place(page):
    found = run(page)
    width = float(page.locator(".flow").get_attribute("width"))
    unit = (width - 2 * EDGE) / (2 * REACH)
    drawn = re.findall(
        r"M([\d.]+) [\d.]+L([\d.]+) [\d.]+", page.locator(".routes").get_attribute("d")
    )
    places = [(float(a) - EDGE) / unit - REACH for a, _ in drawn]
    assert places == pytest.approx(found["input"], abs=1e-3)
    places = [(float(b) - EDGE) / unit - REACH for _, b in drawn]
    assert places == pytest.approx(found["output"], abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (-12, 12, 6, [-10, -5, 0, 5, 10]),
        (0, 100, 5, [0, 20, 40, 60, 80, 100]),
        (0.4, 1.1, 4, [0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round(page, low, high, count, expected):
    found = page.evaluate("given => BNFigure.chart.ticks(...given)", [low, high, count])
    assert found == expected


def test_each_tick_stands_at_its_number(page):
    for name, value in {"offset": 0, "spread": 0.5, "size": 256, "updates": 100}.items():
        slide(page, name, value)
    track = page.locator(".track").first
    path = track.locator("path.running").last.get_attribute("d")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    means = run(page, offset=0, spread=0.5, size=256)["means"]
    low, high = means.index(min(means)), means.index(max(means))
    unit = (heights[high] - heights[low]) / (means[high] - means[low])
    ticks = track.locator(".tick[text-anchor=end]")
    numbers = [float(text.replace("−", "-")) for text in ticks.all_text_contents()]
    assert len(numbers) >= 4
    assert 0 in numbers
    for number, tick in zip(numbers, ticks.all(), strict=True):
        stands = heights[low] + unit * (number - means[low])
        # The text's line is four pixels below its middle.
        assert float(tick.get_attribute("y")) - 4 == pytest.approx(stands, abs=0.2)
    page.get_by_role("button", name="Reset").click()
