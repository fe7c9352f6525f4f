"""The sentence says what is there, and what the chapter promises is seen."""

import re
from itertools import pairwise

import pytest

from figure_page import DOCS, START, choose, run, slide

pytestmark = pytest.mark.slow  # a browser starts

# What the settings show, in the figure's first sample.
SHOWN = [
    ("whole", {}),
    ("rough", {"size": 8}),
    ("rough", {"size": 4, "updates": 100}),
    ("pair", {"size": 2}),
    ("flat", {"gamma": 0}),
    ("flat", {"gamma": 0, "mode": "eval"}),
    ("unstarted", {"mode": "eval", "updates": 0}),
    ("start", {"mode": "eval", "updates": 6}),
    ("partly", {"mode": "eval", "updates": 10}),
    (
        "partly",
        {"mode": "eval", "updates": 10, "spread": 1},
    ),  # the variance never was wrong
    ("partly", {"mode": "eval", "updates": 10, "offset": 0}),  # nor the mean
    ("settled", {"mode": "eval", "updates": 40}),
    ("settled", {"mode": "eval", "updates": 100, "gamma": -2, "beta": 3}),
    ("lucky", {"mode": "eval", "updates": 3, "offset": 0, "spread": 1}),
    ("noisy", {"mode": "eval", "updates": 50, "size": 2}),
    ("noisy", {"mode": "eval", "updates": 100, "size": 2}),
    ("noisy", {"mode": "eval", "updates": 80, "momentum": 1}),
    ("partly", {"mode": "eval", "updates": 100, "momentum": 0.01}),
]


def reading(page, **settings):
    return page.evaluate(
        "settings => BNFigure.reading(settings, BNFigure.model.run(settings))", START | settings
    )


@pytest.mark.parametrize(("expected", "settings"), SHOWN, ids=str)
def test_each_situation_has_its_sentence(page, expected, settings):
    assert reading(page, **settings) == expected


def test_every_sentence_is_said_somewhere_in_both_languages(page):
    words = page.evaluate("() => [BNFigure.texts.en, BNFigure.texts.zh]")
    assert {expected for expected, _ in SHOWN} == set(
        page.evaluate("() => Object.keys(BNFigure.texts.en.reading)")
    )
    for part in ("groups", "controls", "modes", "legend", "numbers"):
        assert list(words[0][part]) == list(words[1][part])
    keys = page.evaluate(
        "() => Object.values(BNFigure.texts).map(text => Object.keys(text.reading))"
    )
    assert keys[0] == keys[1]


def test_a_pair_of_equal_values_is_not_said_to_keep_its_sign(page):
    settings = START | {"size": 2}
    said = page.evaluate(
        "settings => BNFigure.reading(settings, { own: { mean: 5, deviation: 0.001 } })", settings
    )
    assert said == "rough"


def test_a_pair_comes_out_as_what_the_sentence_says(page):
    output = run(page, size=2, gamma=1.5, beta=0.5)["output"]
    assert sorted(output) == pytest.approx([-1, 2], abs=5e-3)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"size": 2, "gamma": -1.5, "beta": 0.5}, ["becomes 2.00,", "other −1.00,"]),
        ({"gamma": 0, "beta": -0.25}, ["β = −0.25"]),
        ({"updates": 10}, ["Of the start of 0 and 1, 34.9%"]),
        ({"updates": 50, "size": 2}, ["batches of 2", "momentum of 0.1,"]),
    ],
    ids=str,
)
def test_the_sentence_has_the_numbers_of_the_figure(page, settings, parts):
    choose(page, "eval" if "updates" in settings else "train")
    for name, value in settings.items():
        slide(page, name, value)
    said = page.locator(".reading").inner_text()
    page.get_by_role("button", name="Reset").click()
    assert all(part in said for part in parts), said


def test_a_rough_mean_is_said_to_be_as_far_off_as_it_is(page):
    slide(page, "size", 4)
    said = page.locator(".reading").inner_text()
    page.get_by_role("button", name="Reset").click()
    off = abs(run(page, size=4)["own"]["mean"] - 5) / 2
    assert said.startswith(f"4 values make a rough mean, here {off:.2f} σ* off the truth.")


def test_what_the_chapter_says_to_try_is_seen(page):
    still, moved = run(page), run(page, offset=-6, spread=0.5)
    assert still["result"]["mean"] == pytest.approx(moved["result"]["mean"], abs=1e-9)
    assert still["result"]["deviation"] == pytest.approx(moved["result"]["deviation"], abs=1e-4)
    assert run(page, updates=10)["left"] == pytest.approx(1 / 3, abs=0.02)
    assert all(reading(page, mode="eval", updates=t) == "settled" for t in range(40, 101))
    pairs, calm = (run(page, size=2, momentum=m)["variances"][40:] for m in (0.1, 0.02))
    assert max(pairs) > 1.4 * min(pairs)
    steps, smaller = ([abs(b - a) for a, b in pairwise(path)] for path in (pairs, calm))
    assert max(smaller) < max(steps) / 3
    assert run(page, size=2, momentum=0.02, updates=10)["left"] > 0.8


@pytest.mark.parametrize("language", ["zh", "en"])
def test_without_javascript_the_chapter_says_what_is_missing(language):
    chapter = (DOCS / "article" / language / "04-train-and-eval.md").read_text(encoding="utf-8")
    inside = re.search(r'<div class="bn-figure" data-lang="\w+">(.+?)</div>', chapter)
    assert "JavaScript" in inside[1]
