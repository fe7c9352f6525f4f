"""benchmarks/peers.py: the others still answer wrongly, and we do not."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    # A dataclass looks its module up.
    sys.modules["peers"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["peers"]
    return module


script = load()


@pytest.mark.slow  # Keras and Flax take seconds to import
@pytest.mark.parametrize("case", script.CASES, ids=range(len(script.CASES)))
def test_they_are_wrong_and_we_are_right(case):
    for ask, name in ((script.by_keras, "keras"), (script.by_flax, "flax.linen")):
        if case.theirs is ask:
            pytest.importorskip(name)
    theirs, ours = case.answers()
    assert case.is_right(ours)
    assert not case.is_right(theirs)


def test_a_right_answer():
    case = script.Case("?", 1, None, "nobody", None, None, within=0.1)
    assert [case.is_right(answer) for answer in (1, 1.09, 1.11, math.nan, "works")] == [
        True, True, False, False, False
    ]  # fmt: skip
    words = script.Case("?", "works", None, "nobody", None, None)
    assert words.is_right("works")
    assert not words.is_right("raises ValueError")


def test_every_case_is_on_the_page():
    text = (ROOT / "benchmarks" / "results" / "peers.md").read_text()
    asked = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")][1:]
    assert asked == [case.question for case in script.CASES]
