"""Each control moves what it is for and nothing else, by mouse and by keyboard."""

import pytest

from figure_page import START, choose, run, slide

pytestmark = pytest.mark.slow  # a browser starts

#: The parts of the figure that can move, as they are drawn.
PARTS = """() => {
    const found = {};
    const drawn = (name, selector) => {
        found[name] = [...document.querySelectorAll(selector)].map(part => part.outerHTML).join('');
        if (!found[name]) throw Error(`nothing is ${selector}`);
    };
    drawn('input', '.flow .input .bar');
    drawn('input truth', '.flow .input .truth');
    drawn('output', '.flow .output .bar');
    drawn('target', '.flow .output .truth');
    drawn('routes', '.flow .routes');
    const [own, result] = document.querySelectorAll('.flow .ruler.batch .span');
    found['own ruler'] = own.outerHTML;
    found['result ruler'] = result.outerHTML;
    drawn('running ruler', '.flow .ruler.running .span');
    const tracks = document.querySelectorAll('.track');
    ['mean', 'variance'].forEach((name, index) => {
        const whole = [...tracks[index].querySelectorAll('path.running')].map(path =>
            path.getAttribute('d').replace(/^M/, '')).reverse().join('L');
        found[`${name} path`] = whole;
        found[`${name} now`] = tracks[index].querySelector('circle').outerHTML;
    });
    return found;
}"""
NOW = {"mean now", "variance now"}
PATHS = {"mean path", "variance path"} | NOW
BEFORE = {"input", "input truth", "own ruler", "running ruler", "routes"}
AFTER = {"output", "result ruler", "routes"}
MOVES = [
    ("size", 32, "train", {"input", "own ruler", "output", "running ruler", "routes"} | PATHS),
    ("offset", -2, "train", BEFORE | {"mean path", "mean now"}),
    ("offset", -2, "eval", BEFORE | AFTER | {"mean path", "mean now"}),
    ("spread", 1, "train", BEFORE | PATHS),
    ("spread", 1, "eval", BEFORE | AFTER | PATHS),
    ("gamma", -2, "train", AFTER | {"target"}),
    ("beta", 1.5, "eval", AFTER | {"target"}),
    ("momentum", 0.5, "train", {"running ruler"} | PATHS),
    ("momentum", 0.5, "eval", {"running ruler"} | AFTER | PATHS),
    ("updates", 60, "train", {"running ruler"} | NOW),
    ("updates", 60, "eval", {"running ruler"} | AFTER | NOW),
]


@pytest.fixture
def figure(page):
    yield page
    page.get_by_role("button", name="Reset").click()


def moved(page, act):
    before = page.evaluate(PARTS)
    act()
    after = page.evaluate(PARTS)
    # A path is cut where the updates stand: its points are compared, not where the cut is.
    return {name for name in before if points(before[name]) != points(after[name])}


def points(drawn):
    return list(dict.fromkeys(drawn.split("L"))) if "<" not in drawn else drawn


def test_it_begins_as_the_chapters_example(page):
    assert page.evaluate("() => BNFigure.widget.START") == START
    shown = page.locator(".slider .value").all_inner_texts()
    assert shown == ["64", "5.0", "2.00", "1.0", "0.00", "0.10", "10"]


@pytest.mark.parametrize(
    ("name", "value", "mode", "expected"),
    MOVES,
    ids=[f"{name} {value} {mode}" for name, value, mode, _ in MOVES],
)
def test_a_slider_moves_what_it_is_for(figure, name, value, mode, expected):
    choose(figure, mode)
    assert moved(figure, lambda: slide(figure, name, value)) == expected


def test_the_mode_changes_the_output_and_what_is_in_use(figure):
    assert moved(figure, lambda: choose(figure, "eval")) == AFTER
    assert figure.locator(".ruler.running.used, .ruler.batch.idle").count() == 2
    labels = figure.locator(".ruler .label")
    assert ["in use" in label for label in labels.all_text_contents()] == [False, True, False]
    assert moved(figure, lambda: choose(figure, "train")) == AFTER
    assert figure.locator(".ruler.running.idle, .ruler.batch.idle").count() == 1
    assert ["in use" in label for label in labels.all_text_contents()] == [True, False, False]


def test_a_new_sample_moves_the_data_and_reset_brings_all_back(figure):
    first = figure.evaluate(PARTS)
    again = figure.get_by_role("button", name="New sample")
    assert moved(figure, again.click) == (BEFORE | AFTER | PATHS) - {"input truth", "result ruler"}
    second = figure.evaluate(PARTS)
    again.click()
    assert figure.evaluate(PARTS) not in (first, second)
    slide(figure, "gamma", 2)
    choose(figure, "eval")
    figure.get_by_role("button", name="Reset").click()
    assert figure.evaluate(PARTS) == first


def test_the_numbers_are_printed_as_they_are(figure):
    slide(figure, "offset", -3)
    slide(figure, "updates", 27)
    slide(figure, "gamma", -0.5)
    choose(figure, "eval")
    found = run(figure, offset=-3, updates=27, gamma=-0.5, mode="eval")
    result = found["result"]
    texts = dict(
        figure.locator("[data-number]").evaluate_all(
            "cells => cells.map(cell => [cell.dataset.number, cell.textContent])"
        )
    )
    assert texts == {
        "left": f"{found['left']:.1%}",
        "meanError": f"{found['meanError']:.2f} σ*".replace("-", "−"),
        "varianceRatio": f"{found['varianceRatio']:.2f}",
        "result": f"{result['mean']:.2f} ± {result['deviation']:.2f}".replace("-", "−"),
    }
    details = figure.locator(".number + .detail").all_inner_texts()
    mean, variance = found["running"]["mean"], found["running"]["variance"]
    assert details == [
        "start: mean 0, variance 1",
        f"{mean:.2f} instead of −3.00".replace("-", "−"),
        f"{variance:.2f} instead of 4.00",
        "target 0.00 ± 0.50",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.001, "0.00"), (-0.5, "−0.50"), (12345, "1.2e+4"), (-123456, "−1.2e+5"), (999, "999.00")],
)
def test_numbers_have_a_minus_and_no_negative_zero(page, value, text):
    assert page.evaluate("value => BNFigure.chart.number(value)", value) == text


def test_the_keyboard_moves_everything(figure):
    size = figure.get_by_role("slider", name="Batch size m")
    size.focus()
    for key, text in [("ArrowLeft", "32"), ("Home", "2"), ("ArrowRight", "4"), ("End", "256")]:
        size.press(key)
        assert size.get_attribute("aria-valuetext") == text
    assert len(figure.locator(".flow .routes").get_attribute("d").split("M")) == 257
    address = figure.url
    size.press("Enter")
    order = ["offset", "spread", "gamma", "beta", "momentum", "updates", "bn-mode-1"]
    for name in order:
        figure.keyboard.press("Tab")
        assert figure.evaluate("() => document.activeElement.name") == name
    figure.keyboard.press("ArrowRight")
    assert figure.get_by_role("radio", name="Evaluation").is_checked()
    for label in ("New sample", "Reset"):
        figure.keyboard.press("Tab")
        assert figure.evaluate("() => document.activeElement.textContent") == label
    figure.keyboard.press("Space")
    assert size.get_attribute("aria-valuetext") == "64"
    assert figure.get_by_role("radio", name="Training").is_checked()
    assert figure.url == address
