"""A diagnosis in a line."""

import torch
from torch import nn

from batchnorm import BatchNorm, diagnose
from batchnorm.tools.findings import Diagnosis, Finding, Gap, LayerReport


def found(code, severity, layer="a"):
    return Finding(code, severity, layer, "a message", {"numbers": list(range(1000))})


def layers(number):
    return tuple(LayerReport(f"layer{index}", "BatchNorm", 8) for index in range(number))


def test_repr_counts_by_severity_and_code():
    findings = (
        found("BN105", "error"), found("BN103", "error"), found("BN105", "error", "b"),
        found("BN202", "warning"), found("BN308", "info", ""), found("BN206", "info"),
    )  # fmt: skip
    whole = Diagnosis(findings, layers(200), Gap(0.8123, 0.0213, None, 16), ("One.", "Two."))
    assert repr(whole) == (
        "Diagnosis(3 errors: BN105 × 2, BN103; 1 warning: BN202; 2 remarks: BN308, BN206; "
        "200 layers, gap 0.81 ± 0.02 over 16 batches, 2 notes)"
    )


def test_repr_of_little():
    assert repr(Diagnosis((), layers(1))) == "Diagnosis(no findings; 1 layer)"
    one = Diagnosis((), (), Gap(float("nan"), float("nan"), None, 1), ("No layers.",))
    assert repr(one) == "Diagnosis(no findings; 0 layers, gap nan ± nan over 1 batch, 1 note)"


def test_repr_of_a_real_one_is_short_and_the_rest_is_there():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), BatchNorm(4)) for _ in range(30)]
    diagnosis = diagnose(nn.Sequential(*blocks), torch.randn(64, 4).split(16))
    assert len(diagnosis.layers) == 30
    assert diagnosis.findings
    assert len(repr(diagnosis)) < 200
    assert repr(diagnosis).endswith("over 4 batches)")
    assert len(diagnosis.to_dict()["findings"]) == len(diagnosis.findings)
