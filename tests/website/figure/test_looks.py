"""Legible in light and dark, wide and narrow, and told apart without colours."""

import re
from itertools import pairwise

import pytest

from batchnorm.figures import LOOKS
from figure_page import choose, slide

pytestmark = pytest.mark.slow  # a browser starts

#: Text colour and the backgrounds from the figure's outermost to the text's own, for every text.
TEXTS = """() => [...document.querySelectorAll('.bn-figure *')].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
).map(element => {
    const style = getComputedStyle(element);
    const behind = [];
    for (let at = element; at; at = at.parentElement) {
        behind.unshift(getComputedStyle(at).backgroundColor);
    }
    return [element.textContent, element instanceof SVGElement ? style.fill : style.color, behind];
})"""
SCHEMES = [
    (None, "light", False),
    (None, "dark", True),
    ("default", "dark", False),
    ("slate", "light", True),
]


def channels(colour):
    *rgb, alpha = [*map(float, re.findall(r"[\d.]+", colour)), 1.0][:4]
    return rgb, alpha


def luminance(rgb):
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def background(layers):
    """The last layer that hides those below; the figure has none that is half transparent."""
    solid = [rgb for rgb, alpha in map(channels, layers) if alpha]
    assert all(channels(layer)[1] in (0, 1) for layer in layers)
    return solid[-1]


@pytest.mark.parametrize(("scheme", "system", "dark"), SCHEMES)
def test_every_word_is_legible_in_light_and_dark(opened, scheme, system, dark):
    page = opened(scheme=scheme, color_scheme=system)
    slide(page, "updates", 0)
    choose(page, "eval")
    slide(page, "gamma", 2)
    found = page.evaluate(TEXTS)
    assert len(found) > 60
    faint = [
        (text, round(ratio, 2))
        for text, colour, layers in found
        if (ratio := contrast(channels(colour)[0], background(layers))) < 4.5
    ]
    assert not faint
    body = page.locator(".bn-figure .body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert (luminance(channels(body)[0]) < 0.1) == dark
    for mark in ("path.truth", "path.running", ".ruler.batch .span", ".each"):
        stroke = page.locator(mark).first.evaluate("e => getComputedStyle(e).stroke")
        assert contrast(channels(stroke)[0], channels(body)[0]) >= 3, mark


def test_colours_and_dashes_are_those_of_every_figure(opened):
    page = opened(scheme="default")
    looks = {}
    for name, mark in [
        ("running", "path.running"), ("batch", ".ruler.batch .span"), ("truth", "path.truth"),
    ]:  # fmt: skip
        look = page.locator(mark).first.evaluate(
            "e => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray]"
        )
        looks[name] = ("#" + "".join(f"{int(c):02X}" for c in channels(look[0])[0]), look[1])
    assert [colour for colour, _ in looks.values()] == [look.colour for look in LOOKS[:3]]
    assert looks["batch"][1] == "none"
    assert looks["running"][1] == "5px, 2px"
    assert looks["truth"][1] == "0.1px, 4px"
    assert page.locator(".ruler.batch rect, .ruler.running circle").count() == 3


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("width", [320, 400, 700, 1200])
def test_nothing_is_cut_or_wider_than_the_page(opened, language, width):
    page = opened(language, width=width)
    extremes = [
        {},
        {"offset": 6, "spread": 3, "gamma": -2, "beta": -3, "updates": 0},
        {"offset": -6, "spread": 3, "gamma": 2, "beta": 3, "updates": 100, "size": 2},
        {"momentum": 1, "size": 2, "spread": 0.5, "updates": 50},
        {"offset": 0, "size": 256, "spread": 0.5, "momentum": 0.01},
    ]
    for mode in ("train", "eval"):
        choose(page, mode)
        for settings in extremes:
            page.evaluate("() => document.querySelectorAll('.buttons button')[1].click()")
            choose(page, mode)
            for name, value in settings.items():
                slide(page, name, value)
            assert page.evaluate("() => document.documentElement.scrollWidth") == width
            cut = page.evaluate(
                """() => [...document.querySelectorAll('.bn-figure svg text')].filter(text => {
                    const box = text.getBoundingClientRect();
                    const frame = text.ownerSVGElement.getBoundingClientRect();
                    return box.left < frame.left - 1 || box.right > frame.right + 1
                        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
                }).map(text => text.textContent)"""
            )
            assert not cut, (settings, mode)


def test_wide_stands_side_by_side_and_narrow_below_each_other(opened):
    page = opened()
    flow, mean = page.locator(".flow"), page.locator(".track").first
    assert mean.bounding_box()["x"] > flow.bounding_box()["x"] + flow.bounding_box()["width"] - 1
    page.set_viewport_size({"width": 400, "height": 900})
    # Drawn anew, not shrunk: letters keep their size.
    page.wait_for_function("() => document.querySelector('.flow').getAttribute('width') < 400")
    below = flow.bounding_box()["y"] + flow.bounding_box()["height"]
    assert mean.bounding_box()["y"] >= below
    assert mean.bounding_box()["x"] == flow.bounding_box()["x"]


def test_labels_of_the_two_means_do_not_cover_each_other(opened):
    page = opened("en", width=400)
    for updates in (0, 20, 100):
        slide(page, "updates", updates)
        boxes = [label.bounding_box() for label in page.locator(".ruler .label").all()]
        boxes.sort(key=lambda box: box["y"])
        for above, below in pairwise(boxes):
            assert above["y"] + above["height"] <= below["y"] + 1


def test_nothing_moves_by_itself(opened):
    page = opened(reduced_motion="no-preference")
    choose(page, "eval")
    slide(page, "updates", 50)
    assert page.evaluate("() => document.getAnimations().length") == 0
