"""The pictures: what they show, taken from the SVG."""

import itertools
import math
import re
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("gradio")  # the package's import asks for it

from batchnorm.figures import INK, LOOKS, RULE
from batchnorm.lab.data import load
from batchnorm.playground import drawing
from batchnorm.playground.settings import Settings
from batchnorm.playground.texts import TEXTS
from batchnorm.playground.training import ARMS, train

SETTINGS = Settings(depth=3, steps=20)


@pytest.fixture(scope="module")
def history():
    return list(train(SETTINGS, load("digits")))


def pictures(history, settings, language="en"):
    """Each picture's caption and root."""
    html = drawing.draw(history, settings, TEXTS[language])
    page = ET.fromstring(f"<div>{html}</div>")
    return {
        figure.find("figcaption").get("id").removesuffix("-title"): (
            figure.find("figcaption").text,
            figure.find("svg"),
        )
        for figure in page
    }


def texts(svg):
    return [element.text for element in svg.iter("text")]


def lines(svg, number):
    """Points of all lines of a series, in the order of drawing; y grows upwards."""
    found = []
    for path in svg.iter("path"):
        style = path.get("style") or ""
        if f"stroke: var(--series{number})" in style and "fill: none" in style:
            pairs = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d"))
            found.append([(float(x), -float(y)) for x, y in pairs])
    return found


def test_curves_are_the_numbers(history):
    found = pictures(history, SETTINGS)
    for name, get in (
        ("accuracy", lambda look: look.accuracy),
        ("loss", lambda look: math.log(look.loss)),
    ):
        scales = []
        for number, arm in enumerate(ARMS, start=1):
            # The legend has a line of each, too.
            curve = max(lines(found[name][1], number), key=len)
            values = [get(shot.looks[arm]) for shot in history]
            assert len(curve) == len(values) == 5
            # Equal steps.
            gaps = [b[0] - a[0] for a, b in itertools.pairwise(curve)]
            assert gaps == pytest.approx([gaps[0]] * 4, abs=1e-3)
            drawn = [y - curve[0][1] for _, y in curve]
            rise = max(range(5), key=lambda i: abs(drawn[i]))
            scale = drawn[rise] / (values[rise] - values[0])
            assert drawn == pytest.approx([scale * (v - values[0]) for v in values], abs=1e-2)
            scales.append(scale)
        # Both on one scale, upwards.
        assert scales[0] == pytest.approx(scales[1], rel=1e-2)
        assert scales[1] > 0


def test_gradients_are_of_now_and_of_the_start(history):
    svg = pictures(history, SETTINGS)["gradients"][1]
    for number, arm in enumerate(ARMS, start=1):
        start, now = (line for line in lines(svg, number) if len(line) == 4)
        logarithms = [
            [math.log10(norm) for norm in history[place].looks[arm].gradients] for place in (0, -1)
        ]
        scale = (start[3][1] - start[0][1]) / (logarithms[0][3] - logarithms[0][0])
        for line, wanted in zip((start, now), logarithms, strict=True):
            drawn = [(y - start[0][1]) / scale + logarithms[0][0] for _, y in line]
            assert drawn == pytest.approx(wanted, abs=2e-3)


def test_a_row_a_layer_with_its_spread(history):
    words = texts(pictures(history, SETTINGS)["inputs"][1])
    for arm in ARMS:
        for histogram in history[-1].looks[arm].histograms:
            assert f"σ {histogram.std:.2g}" in words
    assert words.count("value") == 2
    assert sum(word.startswith("σ") for word in words) == 6
    deep = Settings(depth=20, steps=5)
    words = texts(pictures(list(train(deep, load("digits"))), deep)["inputs"][1])
    assert not any(word.startswith("σ") for word in words)  # no room
    assert [word for word in words if word.isdigit() and int(word) % 2]  # 1, 3, 5, …


def test_words_are_the_pages_and_captions_name_the_pictures(history):
    english, chinese = (pictures(history, SETTINGS, language) for language in ("en", "zh"))
    assert list(english) == ["loss", "accuracy", "gradients", "inputs"]
    for name, (caption, svg) in chinese.items():
        assert caption == TEXTS["zh"][name]
        assert svg.get("aria-labelledby") == f"{name}-title"
        assert svg.get("role") == "img"
        # No English is left.
        assert not [word for word in texts(svg) if re.search("[a-zA-Z]", word)]
        translated = [TEXTS["zh"].get(word, word) for word in texts(english[name][1])]
        assert texts(svg) == translated


def test_colours_are_the_pages_and_nothing_is_fetched(history):
    html = drawing.draw(history, SETTINGS, TEXTS["en"])
    for colour in (INK, RULE, *(look.colour for look in LOOKS)):
        assert colour.lower() not in html.lower()
    assert "http" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_first_snapshot_and_one_without_numbers_can_be_drawn(history):
    assert "</svg>" in drawing.draw(history[:1], SETTINGS, TEXTS["en"])
    # Of the plain one nothing is known: it overflows in the first batch.
    settings = Settings(depth=20, width=256, activation="ReLU", init="1", steps=5)
    wild = list(train(settings, load("digits")))
    assert math.isnan(wild[-1].looks["plain"].loss)
    found = pictures(wild, settings)
    (_legend,) = lines(found["accuracy"][1], 1)
    assert [line for line in lines(found["gradients"][1], 2) if len(line) == 21]


def test_spreads_are_told_in_two_digits():
    told = [drawing._short(number) for number in (0.0, 1.234, 0.0123, 8.1e-5, 12.3, 1e-12, 1234.0)]
    assert told == ["0", "1.2", "0.012", "8e-5", "12", "1e-12", "1.2e+03"]
