"""The how-to pages and those of findings: their code runs as it stands, links lead somewhere."""

import re
from pathlib import Path

import pytest

from processes import launch

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = DOCS / "how-to"
LIST = FOLDER / "index.md"  # of the others, without code
PAGES = sorted({*FOLDER.glob("*.md"), *DOCS.glob("findings/*.md")} - {LIST})


#: What a page's code imports besides torch.
NEEDS = {
    "exporting.md": ("onnxscript", "onnxruntime"),
    "other-frameworks.md": ("keras", "flax"),
}
#: Those packages warn of themselves.
QUIET = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def runs(page):
    marks = [pytest.mark.slow, pytest.mark.filterwarnings(*QUIET)] if page.name in NEEDS else []
    return pytest.param(page, marks=marks, id=page.name)


def blocks(page):
    return [code for code, _ in printing(page)]


def printing(page):
    """Each block of code with what the page says that it prints, if it does."""
    pattern = r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    return re.findall(pattern, page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", [runs(p) for p in PAGES if "torchrun" not in p.read_text()])
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # for the files that it writes
    namespace = {}
    assert blocks(page)
    for block, printed in printing(page):
        if "integrations.lightning" in block:
            pytest.importorskip("lightning.pytorch")
        exec(block, namespace)
        out = capsys.readouterr().out
        assert not printed or out == printed


@pytest.mark.slow
def test_code_for_several_processes_runs(tmp_path):
    program, after = blocks(FOLDER / "several-processes.md")
    last = "distributed.destroy_process_group()\n"
    assert program.endswith(last)
    file = tmp_path / "train.py"
    text = program.removesuffix(last) + after + last
    file.write_text(text + "from processes import leave\nleave()\n")
    ((status, output),) = launch(file, 3, torchrun=True)
    assert status == 0, output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert page.parent.joinpath(target).exists(), target
