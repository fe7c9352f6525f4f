"""What MkDocs is told beyond its configuration: files, navigation, what becomes of each page."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import sources
from quoted import OUTCOMES

#: The program that draws formulas, whole: nothing of it is loaded later.
MATHJAX = "javascripts/tex-svg-full.js"

#: Lets the search run from a file: the name is what Material's plugin `offline` looks for.
IFRAME_WORKER = "javascripts/iframe-worker.js"

#: What stands in a page behind what is quoted from results.
SOURCE = re.compile(r"<!-- (?P<folder>[\w-]+) @ [^<>]* -->")
#: What each word for an outcome, in either language, stands for.
SAID = {word: english for english, chinese in OUTCOMES.items() for word in (english, chinese)}
OUTCOME = re.compile(rf"(?P<said>{'|'.join(SAID)}){SOURCE.pattern}")

#: How a line begins in which a page lists others: a table's, a list's, or the link itself.
LISTED = r"\||- |\d+\. |\["

#: A formula and the punctuation behind it, which must not begin a line.
FORMULA = re.compile(r'<span class="arithmatex">[^<]*</span>[，。；：、？！）”’,.;:?!)]+')

#: Above a page that the Chinese site has in English.
NO_CHINESE = '<p lang="zh" class="only-english">这一页只有英文。</p>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Navigation, scripts and styles are what there is."""
    found = sources.files(_language(config))
    titles = config.extra["titles"]
    config.nav = [
        {
            section: [
                {titles[page]: page} if page in titles else page for page in _pages(found, folder)
            ]
        }
        for folder, section in config.extra["sections"].items()
    ]
    shared = _shared(config)
    config.extra_css += [shared + name for name in sorted(found) if name.endswith(".css")]
    scripts = sorted(name for name in found if name.endswith(".js") and name != IFRAME_WORKER)
    config.extra_javascript += [shared + name for name in scripts]
    config.extra["mathjax"] = shared + MATHJAX
    config.extra["polyfills"] = [shared + IFRAME_WORKER]
    # Its links would begin at the root of a server.
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Of docs, and of what is outside it, what the site is made of."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for place, path in sources.files(_language(config)).items():
        if place.startswith("source/"):
            files.append(File.generated(config, place, content=_listing(path)))
        else:
            files.append(_file(config, place, path))
    files.append(_file(config, MATHJAX, _mathjax()))
    # What browsers ask a server for with pages that name no icon, such as the experiments' reports.
    icon = files.get_file_from_path("assets/images/favicon.png")
    files.append(_file(config, "favicon.ico", Path(icon.abs_src_path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links as they are in the site, and outcomes linked to what they are quoted from."""
    if page.file.abs_src_path is None:
        return markdown
    markdown = sources.outside_blocks(markdown, _linked)
    if page.file.src_uri.startswith("evidence/"):
        # It is not there on GitHub, so the page does not link it itself.
        markdown = markdown.replace("`report.html`", "[`report.html`](report.html)")
    return sources.relinked(markdown, Path(page.file.abs_src_path), _language(config))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What only a page as a browser has it can be told."""
    html = FORMULA.sub(r'<span class="together">\g<0></span>', html)
    if _language(config) == "en":
        return html

    def raised(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page.url), found[2]))
        return found[1] + (
            sources.way(page.url, "zh", place, "en") if place in shared else found[2]
        )

    shared = {file.src_uri for file in files if file.dest_uri.startswith("../")}
    html = re.sub(r'((?:src|href)=")([^"#]*)', raised, html)
    if re.search(r"[一-鿿]", page.markdown or ""):
        return html
    return f'{NO_CHINESE}<div lang="en">{html}</div>'


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The languages lead to this very page in each."""
    # Material would look for a sitemap behind these, which a page in a file may not load.
    output = re.sub(r'<link rel="alternate"[^>]*>', "", output)
    for language in sources.LANGUAGES:
        place = sources.way(page.url, _language(config), page.url, language)
        output = output.replace(f'href="#{language}"', f'href="{place}"')
    return output


def _linked(text: str) -> str:
    def link(found: re.Match[str]) -> str:
        place = f"/docs/evidence/{found['folder']}"
        return f"[{found['said']}]({place}){{ .outcome .{SAID[found['said']]} }}"

    return SOURCE.sub("", OUTCOME.sub(link, text))


def _pages(found: dict[str, Path], folder: str) -> list[str]:
    """The pages of a folder in the order in which its first page lists them."""
    pages = [page for page in sorted(found) if re.fullmatch(rf"{folder}(results/)?[^/]*\.md", page)]
    first = next(page for page in pages if page.endswith(("index.md", "README.md")))
    named = [first, *map(sources.address, sources.targets(found[first], LISTED))]
    return sorted(pages, key=lambda page: named.index(page) if page in named else len(named))


def _file(config: MkDocsConfig, place: str, path: Path) -> File:
    file = File.generated(config, place, abs_src_path=str(path))
    if not place.endswith(".md"):
        # Both languages have the same one; MkDocs leaves the way up out of the links to it.
        file.dest_uri = _shared(config) + place
    return file


def _listing(path: Path) -> str:
    name = path.relative_to(sources.ROOT)
    code = path.read_text(encoding="utf-8")
    return (
        f"---\nsearch:\n  exclude: true\n---\n# {name.name}\n\n`{name}`\n\n"
        f"~~~~{sources.SHOWN[path.suffix]}\n{code}~~~~\n"
    )


def _mathjax() -> Path:
    """Where the package has it; its name is none that could be imported."""
    found = importlib.util.find_spec("sphinx-mathjax-offline")
    if found is None or found.origin is None:
        sys.exit("expected sphinx-mathjax-offline; install: pip install '.[site]'")
    return Path(found.origin).parent / "static" / "mathjax" / "tex-svg-full.js"


def _language(config: MkDocsConfig) -> str:
    language: str = config.theme["language"]
    return language


def _shared(config: MkDocsConfig) -> str:
    """The way to what both languages share."""
    return "" if _language(config) == "en" else "../"
