"""What every experiment must stand, whatever its claim; `tests/lab/test_<name>.py` calls it."""

import json

import torch

from batchnorm import figures
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Findings, Picture, Run, Table
from batchnorm.lab.plots import Figure
from batchnorm.lab.store import strict
from batchnorm.lab.verdict import Verdict


def planned(experiment, settings, data=None):
    """Do every trial once, in the order of the plan, as the runner would; return the runs."""
    data = data or load("digits")
    runs: list[Run] = []
    for _ in range(10):
        wanted = experiment.plan(settings, runs)
        done = {run.trial: run for run in runs}
        assert len(wanted) == len(set(wanted)), "a trial is asked for twice"
        assert set(done) <= set(wanted), "a finished trial is no longer wanted"
        if all(trial in done for trial in wanted):
            return runs
        runs = [done.get(trial) or filed(experiment.run(trial, data)) for trial in wanted]
    raise AssertionError("the plan has no end")


def filed(run):
    """Return the run as it comes back from a file."""
    return Run(
        run.trial, json.loads(strict_json(run.measured)), json.loads(strict_json(run.timing))
    )


def strict_json(value):
    return json.dumps(strict(value), allow_nan=False)


def rehearse(experiment, settings, data=None):
    """Plan, run, analyse and draw with these settings; return the runs and the findings."""
    data = data or load("digits")
    before = torch.get_rng_state()
    runs = planned(experiment, settings, data)
    assert torch.equal(torch.get_rng_state(), before), "global randomness was used"
    again = experiment.run(runs[-1].trial, data)
    assert strict(again.measured) == runs[-1].measured, "a run does not repeat bit for bit"

    findings = experiment.analyse(settings, runs)
    assert isinstance(findings, Findings)
    assert isinstance(findings.table, Table)
    assert all(len(row) == len(findings.table.columns) for row in findings.table.rows)
    judged = [findings.verdict, *(other.verdict for other in findings.also)]
    assert all(isinstance(verdict, Verdict) for verdict in judged)
    claims = [experiment.claim, *(other.claim for other in findings.also)]
    assert len(set(claims)) == len(claims), "two claims are the same sentence"
    for line in (
        findings.summary,
        *findings.recipe,
        *findings.caveats,
        *findings.not_shown,
        *claims,
    ):
        assert line.endswith("."), line
        assert "nan" not in line.split(), line
    assert findings.recipe
    assert findings.not_shown

    with figures.style():
        pictures = experiment.figures(settings, runs)
        assert pictures
        assert len({picture.name for picture in pictures}) == len(pictures)
        for picture in pictures:
            assert isinstance(picture, Picture)
            assert isinstance(picture.figure, Figure)
            assert picture.see.endswith(".")
            for axes in picture.figure.axes:
                # Of panels that share an axis, the outer one bears its name.
                alike = axes.get_shared_y_axes().get_siblings(axes)
                named = any(one.get_ylabel() or one.get_yticklabels() for one in alike)
                assert named or axes.figure.get_supylabel(), "an axis without a name"
            picture.figure.draw_without_rendering()
    return runs, findings
