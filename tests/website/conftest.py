"""The site, built once for all tests of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from browser import needed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder that it was built into."""
    for module in ("mkdocs", "material", "mkdocstrings", "jieba", "sphinx-mathjax-offline"):
        needed(module)
    filelock = needed("filelock")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # all workers share one
    out, built = base / "site", base / "site.built"
    with filelock.FileLock(base / "site.lock"):
        if not built.exists():
            command = [sys.executable, "website/build.py", "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"Built: {out / 'index.html'}\n"
            assert "WARNING" not in done.stderr, done.stderr
            built.touch()
    return out
