"""The two READMEs: their code runs, their commands and files exist, and they say the same."""

import re
from pathlib import Path

import pytest

from batchnorm import exercises

ROOT = Path(__file__).resolve().parent.parent
READMES = {name: (ROOT / name).read_text() for name in ("README.md", "README.zh.md")}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def code(text):
    """Without comments, which differ between the languages."""
    return [re.sub(r" *#.*", "", line).rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("name", READMES)
def test_code_runs(name):
    (block,) = blocks(READMES[name], "python")
    namespace = {}
    exec(block, namespace)
    assert namespace["y"].min() == 0
    assert namespace["y"].shape == (4, 16, 7)


@pytest.mark.parametrize("language", ["python", "sh"])
def test_both_have_the_same_code(language):
    english, chinese = (blocks(text, language) for text in READMES.values())
    assert [code(block) for block in english] == [code(block) for block in chinese]


@pytest.mark.parametrize("name", [*READMES, "benchmarks/README.md", "CONTRIBUTING.md"])
def test_links_and_pictures_exist(name):
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text())
    local = [target for target in targets if not target.startswith("https://")]
    assert len(local) >= (6 if name in READMES else 0)
    for target in local:
        assert (ROOT / name).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("name", READMES)
def test_make_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(READMES[name], "sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    ("name", "words"), [("README.md", "experiments"), ("README.zh.md", "个实验")]
)
def test_the_number_of_experiments_is_right(name, words):
    lab = pytest.importorskip("batchnorm.lab")
    assert f"{len(lab.discover())} {words}" in READMES[name]


@pytest.mark.parametrize(
    ("name", "words"), [("README.md", "ten exercises"), ("README.zh.md", "十道练习")]
)
def test_the_number_of_exercises_is_right(name, words):
    assert len(exercises.discover()) == 10
    assert words in READMES[name]
