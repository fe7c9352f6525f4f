"""BN101 and BN308 of a model as a whole."""

import math

import pytest
import torch
from torch import nn

from batchnorm import diagnose, recalibrate
from batchnorm.tools.diagnosis.whole import check_gap
from batchnorm.tools.findings import Finding, Gap, LayerReport

LAYERS = tuple(
    LayerReport(n, "BatchNorm", 8, share=s) for n, s in (("a", 0.2), ("b", 0.9), ("c", -0.1))
)


def codes(value, left, error=0.01, found=()):
    given = [Finding(code, severity, "a", "") for code, severity in found]
    findings = check_gap(Gap(value, error, left, 8), given, LAYERS)
    assert all(finding.layer == "" for finding in findings)
    return [(finding.code, finding.severity) for finding in findings]


@pytest.mark.parametrize(
    ("value", "left", "expected"),
    [
        (0.3, 0.1, []),
        (0.36, 0.08, [("BN101", "warning")]),  # √(0.36² − 0.08²) = 0.351
        (0.35, 0.08, []),  # 0.341
        (0.72, 0.1, [("BN101", "error")]),
        (0.7, 0.1, [("BN101", "warning")]),
        (0.55, 0.51, [("BN308", "warning")]),
        (0.5, 0.49, []),
        (0.4, 0.8, [("BN308", "warning")]),
        (1.5, 0.8, [("BN101", "error"), ("BN308", "warning")]),
        (math.nan, 0.1, []),
        (2.0, None, []),
        (2.0, math.inf, []),
    ],
)
def test_thresholds(value, left, expected):
    assert codes(value, left) == expected


def test_what_is_within_the_error_is_none():
    assert codes(0.6, 0.1, error=0.17) == []
    assert codes(0.6, 0.1, error=0.16) == [("BN101", "warning")]


@pytest.mark.parametrize(
    ("code", "severity", "left"),
    [
        ("BN101", "warning", ["BN308"]),
        ("BN105", "error", ["BN308"]),
        ("BN101", "info", ["BN101", "BN308"]),  # of a frozen layer, which makes no gap
        ("BN301", "warning", ["BN101"]),
        ("BN206", "warning", ["BN101"]),
        ("BN202", "info", ["BN101", "BN308"]),
    ],
)
def test_what_a_layer_explains_is_not_said_again(code, severity, left):
    assert [found for found, _ in codes(1.5, 0.8, found=[(code, severity)])] == left


def test_the_message_names_the_largest_shares():
    (finding,) = check_gap(Gap(1.3, 0.02, 0.14, 8), [], LAYERS)
    assert "1.3 apart; with exact running statistics they would be 0.14 apart" in finding.message
    assert finding.message.endswith("(the largest shares: b 90%, a 20%)")
    assert finding.evidence == {
        "gap": 1.3, "gap_error": 0.02, "gap_recalibrated": 0.14,
        "excess": pytest.approx(math.sqrt(1.3**2 - 0.14**2)),
    }  # fmt: skip


def test_errors_of_many_layers_add_up():
    """Each is off by less than any threshold of a layer; recalibrate repairs it, as it says."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(5):
        model.extend([nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32, momentum=None), nn.ReLU()])
    model.append(nn.Linear(32, 4))
    batches = [torch.randn(256, 32) for _ in range(8)]
    recalibrate(model, batches)
    assert diagnose(model, batches).findings == ()
    with torch.no_grad():
        for layer in model[1::3]:
            layer.running_mean += 0.25 * torch.randn(32) * layer.running_var.sqrt()
    (finding,) = diagnose(model, batches).findings
    assert (finding.code, finding.severity, finding.layer) == ("BN101", "warning", "")
    recalibrate(model, batches)
    assert diagnose(model, batches).findings == ()
    # Not if that is not wanted.
    assert diagnose(model, [16 * x for x in batches], ignore=("BN101",)).findings == ()


def test_batches_that_no_statistics_can_stand_for():
    """Two samples of many positions each: enough values, and no two batches alike."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    samples = torch.randn(64, 1, 8, 8) * torch.rand(64, 1, 1, 1).exp() ** 2
    recalibrate(model, list(samples.split(2)))
    (finding,) = diagnose(model, list(samples.split(2))).findings
    assert (finding.code, finding.layer) == ("BN308", "")
    assert finding.evidence["gap_recalibrated"] > 0.5
    assert diagnose(model, list(samples.split(32))).findings == ()
