"""The corpus of benchmarks/diagnosis: every planted fault is found, nothing in healthy models."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

FOLDER = Path(__file__).parent.parent / "benchmarks" / "diagnosis"


def load():
    """The corpus's main module. Its folder's modules have short names, and do not stay."""
    own = {path.stem for path in FOLDER.glob("*.py")} - {"__main__"}
    before = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("corpus", FOLDER / "__main__.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)


CORPUS = load()
CASES = {case.name: case for case in CORPUS.CASES}


@pytest.fixture(autouse=True)
def _as_it_is_run():
    """Without what other tests need."""
    import torch

    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_case(name):
    if "transformers" in name:
        pytest.importorskip("transformers")
    row = CORPUS.judge(CASES[name], CORPUS.SEED)
    if row["planted"]:
        assert row["found"], row["messages"]
    else:
        assert row["messages"] == []


def test_every_family_is_planted():
    """Each code but that of processes, of which there is one here, and those of checkpoints."""
    from batchnorm.tools.findings import CODES

    planted = {code for case in CASES.values() for code in case.codes}
    assert set(CODES) - planted <= {"BN107", "BN109", "BN306", "BN307"}
