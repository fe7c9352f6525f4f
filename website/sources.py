"""Which file of the repository is which page of the site, and where the links between them lead.

The repository is to be read as it is: its links are relative to the files that they stand in. The
site has the same files at shorter addresses, once for each language: where a page has no Chinese
version, the Chinese site has the English one.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "zh")

#: Where `build.py` makes the experiments' reports.
REPORTS = ROOT / "build" / "reports"

#: What the site is made of.
PATTERNS = (
    "docs/*.md",
    "docs/article/*/*.md",
    "docs/how-to/*.md",
    "docs/findings/*.md",
    "docs/api/*.md",
    "docs/evidence/*.md",
    "build/reports/report.html",
    "build/reports/*/report.html",
    "docs/evidence/*/results.json",
    "docs/images/*",
    "docs/javascripts/**/*.js",
    "docs/stylesheets/*.css",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.svg",
    "examples/README.md",
    "src/batchnorm/kernels/README.md",
    "README*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)

#: Where the site has what would else lie deep, or take the place of its first page.
ELSEWHERE = {
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "src/batchnorm/kernels/README.md": "derivation.md",
}

#: Sources that a page links to are shown as pages, too, in the language that they are written in.
SHOWN = {".py": "python", ".h": "cpp", ".cpp": "cpp", "": "text"}

BLOCKS = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(
    r"\[(?P<text>[^\[\]]*)\]\((?![a-z]+:|#)(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)


def files(language: str) -> dict[str, Path]:
    """Every file of the site in a language, by its address."""
    names = [
        path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern)
    ]
    # A page of this language comes after the one that it takes the place of.
    names = [name for name in names if language_of(name) in (None, language)]
    names.sort(key=lambda name: (language_of(name) is not None, name))
    found = {address(name): ROOT / name for name in names}
    for path in list(found.values()):
        if path.suffix == ".md":
            for target in targets(path):
                if Path(target).suffix in SHOWN and (ROOT / target).is_file():
                    found[address(target)] = ROOT / target
    return found


def language_of(name: str) -> str | None:
    """The language whose site alone has a file; None if both may."""
    if found := re.match(r"docs/article/(\w+)/", name):
        return found[1]
    return "zh" if name.endswith(".zh.md") else None


def address(name: str) -> str:
    """Where the site has a file of the repository; `.md` stands for the page made from it."""
    name = name.replace(".zh.md", ".md").replace("build/reports/", "docs/evidence/")
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if re.fullmatch(r"docs/evidence/[\w-]+", name):
        return f"{name.removeprefix('docs/')}/report.html"
    if Path(name).suffix in SHOWN:
        return f"source/{name}.md"
    return re.sub(r"^article/\w+/", "article/", name.removeprefix("docs/"))


def relinked(markdown: str, source: Path, language: str) -> str:
    """A page with its links as they are in the site."""
    name = source.relative_to(ROOT).as_posix()
    page = address(name)

    def anew(found: re.Match[str]) -> str:
        target = _target(name, found["target"])
        place, text, anchor = address(target), found["text"], found["anchor"] or ""
        other = language_of(target) or language
        if other == language:
            return f"[{text}]({way(page, language, place, language)}{anchor})"
        # Not a page of this site to MkDocs, so it is given as a browser needs it.
        place = way(page, language, place.replace(".md", ".html"), other)
        return f'<a href="{place}{anchor}">{text}</a>'

    return outside_blocks(markdown, lambda text: LINK.sub(anew, text))


def way(page: str, language: str, place: str, other: str) -> str:
    """The way from a page of a language's site to what another's has."""
    # The Chinese site is in a folder of the English one.
    roots = {"en": "", "zh": "zh/"}
    return posixpath.relpath(roots[other] + place, posixpath.dirname(roots[language] + page) or ".")


def outside_blocks(markdown: str, change: Callable[[str], str]) -> str:
    """A page with all changed that is no block of code."""
    parts = BLOCKS.split(markdown)
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def targets(path: Path, lines: str = "") -> list[str]:
    """Every file of the repository that a page links to, in its order; in lines that begin so."""
    name = path.relative_to(ROOT).as_posix()
    text = BLOCKS.sub("", path.read_text(encoding="utf-8"))
    kept = "\n".join(line for line in text.splitlines() if re.match(lines, line))
    return [_target(name, found["target"]) for found in LINK.finditer(kept)]


def _target(name: str, link: str) -> str:
    # A link that begins with a slash begins at the root of the repository.
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link)).lstrip("/")
