"""Build the site, in both languages.

    python website/build.py [--out DIR] [--serve [--port N]]

It comes with all that it needs: it opens from a file, and nothing is loaded from anywhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import shutil
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jieba
from mkdocs.commands.build import build
from mkdocs.config import load_config

import sources
from batchnorm import lab

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src" / "batchnorm" / "site"

#: What every built site has, and no other folder of somebody's.
BUILT = "objects.inv"


def reports() -> None:
    """Make the experiments' reports, unless they are newer than all that they are made from.

    From copies of the results: beside these, the committed page of claims would be replaced.
    """
    page = sources.REPORTS / "report.html"
    made = page.stat().st_mtime if page.exists() else 0
    results = list((ROOT / "docs" / "evidence").glob("*/results.json"))
    code = Path(lab.__file__).parent
    makers = [code.parent / "figures.py", *code.rglob("*.py"), *code.glob("*.html")]
    if all(source.stat().st_mtime <= made for source in [*results, *makers]):
        return
    shutil.rmtree(sources.REPORTS, ignore_errors=True)
    for result in results:
        folder = sources.REPORTS / result.parent.name
        folder.mkdir(parents=True)
        shutil.copyfile(result, folder / result.name)
    lab.write_report(sources.REPORTS)


def main() -> None:
    """Build; then serve, if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--serve", action="store_true", help="serve it on this machine, then")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / BUILT).exists():
        sys.exit(f"{out}: expected a new folder or a site built before, as it is emptied first")
    with server(out, options.port) if options.serve else contextlib.nullcontext() as serving:
        make(out)
        if serving:
            sys.stdout.write(
                f"Serving at http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)\n"
            )
            with contextlib.suppress(KeyboardInterrupt):
                serving.serve_forever()


def make(out: Path) -> None:
    """Build both languages into a folder."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    jieba.setLogLevel(logging.WARNING)  # it tells how it loads its dictionary
    reports()
    for name, folder in (("mkdocs.yml", out), ("mkdocs.zh.yml", out / "zh")):
        build(load_config(str(ROOT / name), site_dir=str(folder)))
    sys.stdout.write(f"Built: {out / 'index.html'}\n")


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of a folder, to this machine alone; it has its port from now on."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        sys.exit(f"port {port}: {error}; choose another one with --port N (make docs PORT=N)")


if __name__ == "__main__":
    main()
