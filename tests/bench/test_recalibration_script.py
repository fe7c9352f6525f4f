"""benchmarks/recalibration.py: what it writes when it has measured."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[2] / "benchmarks" / "recalibration.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("recalibration_script", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SEEDS", range(2))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process
    return module


def test_all_three_files(script, monkeypatch, tmp_path):
    """Figures come last: what they lack would show after minutes."""
    rows = [
        {"setting": title, "seed": seed, "estimator": name, "test_error": 0.1, "inconsistency": 0.2}
        for title, *_ in script.SETTINGS
        for seed in script.SEEDS
        for name in script.ESTIMATORS
    ]
    monkeypatch.setattr(script, "measure", lambda: copy.deepcopy(rows))
    monkeypatch.setattr(sys, "argv", ["recalibration.py", "--json", str(tmp_path / "of.json")])
    script.main()
    assert json.loads((tmp_path / "of.json").read_text())["rows"] == rows
    assert "![Test error by source of the running statistics](of.svg)" in (
        (tmp_path / "of.md").read_text()
    )
    drawn = (tmp_path / "of.svg").read_text()
    assert all(name.replace('"', "&quot;") in drawn or name in drawn for name in script.ESTIMATORS)


def test_the_estimators_are_what_they_say(script):
    """Of a first layer, in float64 from the same batches."""
    torch.manual_seed(0)
    batches = [3 + 2 * torch.randn(n, 1, 8, 8) for n in (7, 2)]
    whole = torch.cat(batches).double()
    plain = torch.stack([batch.double().var() for batch in batches]).mean()
    expected = {
        "torch's update_bn": plain,
        "fvcore's estimator": whole.var(correction=0),
        'recalibrate, "batch"': whole.var(),
        'recalibrate, "layerwise"': whole.var(),
    }
    for name, var in expected.items():
        model = script.network()
        script.ESTIMATORS[name](model, batches)
        torch.testing.assert_close(model[0].running_var.double(), var[None], rtol=1e-6, atol=0)
