"""The committed results: whole, of this code's recipes, and every page made from them is theirs."""

import dataclasses
import json
from pathlib import Path

import matplotlib as mpl
import pytest

import pictures
from batchnorm import lab
from batchnorm.lab import results
from batchnorm.lab.store import strict

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence"
FOLDERS = sorted(path.parent.name for path in EVIDENCE.glob(f"*/{results.FILE}"))


def folders(profile):
    return {
        lab.default_directory(name, profile=profile, seeds=None, data="digits")
        for name in lab.discover()
    }


def test_every_experiment_was_run_in_both_profiles():
    assert set(FOLDERS) == folders("quick") | folders("full")


def assert_alike(made, committed):
    """Equal, but for the rounding of floats, in which processors may differ."""
    if isinstance(committed, dict):
        assert made.keys() == committed.keys()
        for key, value in committed.items():
            assert_alike(made[key], value)
    elif isinstance(committed, list):
        assert len(made) == len(committed)
        for one, other in zip(made, committed, strict=True):
            assert_alike(one, other)
    elif isinstance(committed, float):
        assert made == pytest.approx(committed, rel=1e-9, abs=1e-12)
    else:
        assert made == committed


@pytest.mark.parametrize("folder", FOLDERS)
def test_committed_results_are_what_this_code_finds_in_their_runs(folder):
    found = results.read(EVIDENCE / folder)
    experiment, settings = found.experiment, found.settings
    assert found.content["experiment"]["recipe"] == experiment.recipe
    assert settings == experiment.profiles[found.content["profile"]]
    findings = experiment.analyse(settings, found.runs)
    again = json.loads(json.dumps(strict(dataclasses.asdict(findings))))
    assert_alike(again, found.content["findings"])
    for field in ("claim", "source"):
        assert found.content["experiment"][field] == getattr(experiment, field)


@pytest.mark.slow
def test_the_committed_page_of_claims_is_of_these_results(tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / results.FILE).symlink_to(EVIDENCE / folder / results.FILE)
    lab.write_report(tmp_path)
    assert (tmp_path / "claims.md").read_text() == (EVIDENCE / "claims.md").read_text()
    made_with = results.read(EVIDENCE / "convergence").content["environment"]["matplotlib"]
    if made_with == mpl.__version__:  # another one may draw a little differently
        copies = list(pictures.copies(tmp_path))
        assert copies
        for picture, figure in copies:
            assert picture.read_text() == figure.read_text(), picture.name
