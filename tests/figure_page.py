"""A page with the interactive figure of chapter 4, and the hand that moves its sliders."""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCRIPTS = sorted((DOCS / "javascripts" / "bn-figure").glob("*.js"))
STYLE = DOCS / "stylesheets" / "bn-figure.css"

#: How a figure begins; a test holds the page to it.
START = {
    "size": 64, "offset": 5, "spread": 2, "gamma": 1, "beta": 0, "momentum": 0.1, "updates": 10,
    "mode": "train", "seed": 7,
}  # fmt: skip

#: Moves a slider of the page's figure to a value, as a hand would.
SLIDE = """([figure, name, value]) => {
    const input = document.querySelectorAll('.bn-figure')[figure].querySelector(`[name=${name}]`);
    const index = BNFigure.widget.SLIDERS[name][1].indexOf(value);
    if (index < 0) throw Error(`${name} has no ${value}`);
    input.value = index;
    input.dispatchEvent(new Event('input'));
}"""


def written(path, languages, scheme):
    figures = "".join(f'<div class="bn-figure" data-lang="{name}"></div>' for name in languages)
    scripts = "".join(f'<script src="{script.as_uri()}"></script>' for script in SCRIPTS)
    attribute = f' data-md-color-scheme="{scheme}"' if scheme else ""
    path.write_text(
        f'<!doctype html><html lang="{languages[0]}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f'<link rel="stylesheet" href="{STYLE.as_uri()}"><title>figure</title></head>'
        f'<body{attribute} style="margin: 8px">{figures}{scripts}</body></html>',
        encoding="utf-8",
    )
    return path.as_uri()


def slide(page, name, value, figure=0):
    page.evaluate(SLIDE, [figure, name, value])


def choose(page, mode):
    page.locator(f".bn-figure input[value={mode}]").first.check(force=True)


def run(page, **settings):
    """What the figure's model makes of its first settings, but for these."""
    return page.evaluate("settings => BNFigure.model.run(settings)", START | settings)
