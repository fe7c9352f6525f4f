"""report.html and the figures, made from results.json and nothing else."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from batchnorm import figures
from batchnorm.errors import BatchNormError
from batchnorm.lab import results
from batchnorm.lab.experiments import Picture
from batchnorm.lab.overview import NUMBERS, Overview, markdown, overview, strongest
from batchnorm.lab.runner import core_seconds
from batchnorm.lab.store import write_atomically
from batchnorm.lab.verdict import CONTRADICTED, REPRODUCED, UNRESOLVED, Verdict
from batchnorm.lab.words import duration

TEMPLATE = "report.template.html"

TITLE = "The claims made for batch normalization, tested at home"

# Beside the word, for the eye that looks for them.
MARKS = {REPRODUCED: "✓", CONTRADICTED: "✗", UNRESOLVED: "?"}

# 5.2 inches then are 936 pixels: sharp on a dense screen, and small enough to be kept in git.
PNG_DPI = 180

# Points; also the radius of the card's corners.
CARD_PADDING = 10


def build(directory: Path, note: Callable[[str], None] = lambda _: None) -> Path:
    """Write report.html and figures/ into a directory with a results.json; return the page's path.

    Of a directory whose subdirectories have them, each gets its own, and the directory a page with
    all claims, and claims.md; results that cannot be read are left out, and `note` is told why. The
    same results give the same report, byte for byte.

    Raises:
        InputError: there are no results, or none that can be read.
        ArgumentError: there is a page that is not the lab's.
    """
    results.check_pages(directory)
    below = sorted(path.parent for path in directory.glob(f"*/{results.FILE}"))
    if (directory / results.FILE).exists() or not below:
        return _own_page(directory, _section(directory))
    sections, errors = [], []
    for folder in below:
        try:
            section = _section(folder)
        except BatchNormError as error:
            note(f"Left out of the page: {error}")
            errors.append(error)
            continue
        _own_page(folder, section)
        sections.append(_placed(section, folder.name))
    if not sections:
        raise errors[0]
    above = overview(sections)
    write_atomically(directory / results.CLAIMS, markdown(above))
    return _write(directory, TITLE, strongest(sections), above)


def _own_page(directory: Path, section: dict[str, Any]) -> Path:
    claim = section["experiment"]["claim"]
    placed = _placed(section, section["experiment"]["name"])
    return _write(directory, f"{claim} — {section['verdict'].outcome}", [placed])


def _write(
    directory: Path, title: str, sections: list[dict[str, Any]], above: Overview | None = None
) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.lab", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE)
    html = page.render(
        title=title,
        sections=sections,
        overview=above,
        numbers=NUMBERS,
        zip=zip,
        looks=figures.LOOKS,
        marks=MARKS,
    )
    path = directory / results.PAGE
    write_atomically(path, html)
    return path


def _section(directory: Path) -> dict[str, Any]:
    """All that a page says of one experiment; its figures are written, too."""
    found = results.read(directory)
    content = found.content
    findings = content["findings"]
    folder = directory / results.FIGURES
    folder.mkdir(exist_ok=True)
    with figures.style():
        pictures = found.experiment.figures(found.settings, found.runs)
        drawings = [_svg(picture) for picture in pictures]
        for picture, drawing in zip(pictures, drawings, strict=True):
            write_atomically(folder / f"{picture.name}.svg", _card(drawing))
            write_atomically(folder / f"{picture.name}.png", _png(picture))
    return {
        **content,
        "verdict": _verdict(findings["verdict"]),
        "also": [{**other, "verdict": _verdict(other["verdict"])} for other in findings["also"]],
        "drawings": list(zip(pictures, drawings, strict=True)),
        "duration": duration(sum(core_seconds(run["timing"]) for run in content["runs"])),
    }


def _placed(section: dict[str, Any], anchor: str) -> dict[str, Any]:
    """The section where a page has it: two of one page must not share an id."""
    placed = [
        {
            "picture": picture,
            "anchor": f"{anchor}-{picture.name}",
            "svg": figures.inline(drawing, f"{anchor}-{picture.name}"),
        }
        for picture, drawing in section["drawings"]
    ]
    return {**section, "anchor": anchor, "figures": placed}


def _verdict(content: dict[str, Any]) -> Verdict:
    return Verdict(**{**content, "differences": tuple(content["differences"])})


def _svg(picture: Picture) -> str:
    buffer = io.StringIO()
    picture.figure.savefig(
        buffer,
        format="svg",
        facecolor="none",
        # A date would make two builds differ.
        metadata={"Date": None, "Title": picture.title},
    )
    return buffer.getvalue()


def _card(svg: str) -> str:
    """Return an SVG file that stands by itself: on a white card, for pages that may be dark."""
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt" viewBox="[^"]*"', svg)
    assert size  # noqa: S101 - matplotlib always writes it
    width, height = (float(number) + 2 * CARD_PADDING for number in size.groups())
    place = f'x="{-CARD_PADDING}" y="{-CARD_PADDING}" width="{width:g}" height="{height:g}"'
    view = f"{-CARD_PADDING} {-CARD_PADDING} {width:g} {height:g}"
    svg = svg.replace(size[0], f'width="{width:g}pt" height="{height:g}pt" viewBox="{view}"', 1)
    card = f' <rect {place} rx="{CARD_PADDING}" style="fill: #ffffff"/>\n'
    return svg.replace(" <defs>", f"{card} <defs>", 1)


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white")
    return buffer.getvalue()
