"""Build the site, in both languages.

    python website/build.py [--out DIR] [--serve [--port N]]

It comes with all that it needs: it opens from a file, and nothing is loaded from anywhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jieba
from mkdocs.commands.build import build
from mkdocs.config import load_config

from batchnorm import lab

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src" / "batchnorm" / "site"
EVIDENCE = ROOT / "docs" / "evidence"


def reports() -> None:
    """Make the experiments' reports, unless they are newer than all that they are made from."""
    page = EVIDENCE / "report.html"
    made = page.stat().st_mtime if page.exists() else 0
    code = Path(lab.__file__).parent
    sources = [*EVIDENCE.glob("*/results.json"), *code.rglob("*.py"), *code.glob("*.html")]
    if any(source.stat().st_mtime > made for source in sources):
        lab.write_report(EVIDENCE)


def main() -> None:
    """Build; then serve, if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--serve", action="store_true", help="serve it on this machine, then")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    jieba.setLogLevel(logging.WARNING)  # it tells how it loads its dictionary
    reports()
    out = options.out.resolve()
    for name, folder in (("mkdocs.yml", out), ("mkdocs.zh.yml", out / "zh")):
        build(load_config(str(ROOT / name), site_dir=str(folder)))
    sys.stdout.write(f"Built: {out / 'index.html'}\n")
    if options.serve:
        serve(out, options.port)


def serve(folder: Path, port: int) -> None:
    """Serve a folder to this machine alone, until Ctrl-C."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        sys.exit(f"port {port}: {error.strerror}; choose another one with --port N")
    sys.stdout.write(f"Serving at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)\n")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
