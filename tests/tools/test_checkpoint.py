"""What a checkpoint tells: each finding with its numbers, and nothing of healthy ones."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import ArgumentError, BatchNorm, bank, inspect_checkpoint


@pytest.fixture
def inspect(tmp_path):
    def save_and_inspect(content, **options):
        torch.save(content, tmp_path / "checkpoint.pt")
        found = inspect_checkpoint(tmp_path / "checkpoint.pt", **options)
        assert all(len(finding.remedy) > 20 for finding in found.findings)
        return found

    return save_and_inspect


def statistics(channels=16, updates=1000, **changes):
    """A healthy layer's part of a state dict, after enough updates."""
    layer = {
        "weight": torch.rand(channels) + 0.5,
        "bias": torch.randn(channels),
        "running_mean": torch.randn(channels),
        "running_var": torch.rand(channels) + 0.5,
        "num_batches_tracked": torch.tensor(updates),
    }
    layer.update(changes)
    return {name: value for name, value in layer.items() if value is not None}


def state(**layers):
    return {f"{name}.{key}": value for name, part in layers.items() for key, value in part.items()}


def said(diagnosis):
    return [(finding.code, finding.severity, finding.layer) for finding in diagnosis.findings]


def with_value(tensor, places, value):
    tensor = tensor.clone()
    tensor[places] = value
    return tensor


def test_not_finite(inspect):
    mean = with_value(torch.randn(16), [3, 5], math.nan)
    var = with_value(torch.ones(16), [5, 9], math.inf)
    found = inspect(state(a=statistics(), b=statistics(running_mean=mean, running_var=var)))
    assert said(found) == [("BN103", "error", "b")]
    evidence = found.findings[0].evidence
    assert evidence == {
        "channels": [3, 5, 9],
        "number": 3,
        "of": 16,
        "running_mean": {"nan": 2, "infinite": 0},
        "running_var": {"nan": 0, "infinite": 2},
    }
    assert "3 of 16 channels (3, 5, 9)" in found.findings[0].message


def test_channels_are_said_as_one_says_them(inspect):
    for mean, words in (
        (torch.tensor([math.nan]), "in the only channel:"),
        (torch.full((4,), math.nan), "in all 4 channels:"),
        (with_value(torch.randn(4), [1], math.nan), "in 1 of 4 channels (1):"),
        (with_value(torch.randn(16), range(9), math.nan), "channels (0, 1, 2, 3, 4, 5, …):"),
    ):
        layer = statistics(len(mean), running_mean=mean)
        (message,) = [f.message for f in inspect(state(a=layer)).findings if f.code == "BN103"]
        assert words in message


def test_variance_zero_or_negative(inspect):
    healthy = torch.rand(16) + 0.5
    negative = with_value(healthy, [2], -1e-3)
    found = inspect(state(a=statistics(running_var=negative)))
    assert said(found) == [("BN104", "error", "a")]
    assert found.findings[0].evidence["lowest"] == pytest.approx(-1e-3)
    assert found.findings[0].evidence["negative"] == {"channels": [2], "number": 1, "of": 16}
    assert found.findings[0].evidence["zero"]["number"] == 0
    zero = with_value(healthy, [2, 7], 0)
    found = inspect(state(a=statistics(running_var=zero)))
    assert said(found) == [("BN104", "warning", "a")]
    assert found.findings[0].evidence["zero"]["number"] == 2
    assert said(inspect(state(a=statistics(running_var=zero, weight=None)))) == said(found)
    # Where nothing but zeros came, as behind a ReLU that is never on, the mean is zero, too.
    mean = with_value(torch.randn(16), [2, 7], 0)
    found = inspect(state(a=statistics(running_var=zero, running_mean=mean)))
    assert said(found) == [("BN104", "info", "a")]
    found = inspect(state(a=statistics(running_var=torch.zeros(16))))
    assert said(found) == [("BN104", "error", "a")]
    # With γ = 0 nothing comes of it.
    gamma = with_value(torch.ones(16), [2, 7], 0)
    found = inspect(state(a=statistics(running_var=zero, weight=gamma)))
    assert said(found)[0] == ("BN104", "info", "a")
    assert "of no consequence" in found.findings[0].message


@pytest.mark.parametrize("make", [BatchNorm, nn.BatchNorm1d], ids=["ours", "torch"])
def test_never_updated(inspect, make):
    model = nn.Sequential(make(4), make(4))
    assert said(inspect(model.state_dict())) == [
        ("BN105", "warning", "0"),
        ("BN105", "warning", "1"),
    ]
    # γ that has been trained: such a model is meant to be evaluated.
    nn.init.uniform_(model[0].weight)
    assert said(inspect(model.state_dict()))[0] == ("BN105", "error", "0")
    nn.init.ones_(model[0].weight)
    nn.init.uniform_(model[0].bias)
    assert said(inspect(model.state_dict()))[0] == ("BN105", "error", "0")
    # A counter that says something else.
    model[1].num_batches_tracked.fill_(7)
    found = inspect(model.state_dict())
    assert said(found) == [("BN105", "error", "0"), ("BN105", "error", "1")]
    assert found.findings[1].evidence == {"updates": 7, "affine_trained": False}
    # Statistics without a counter, as frozen layers and old files have them.
    content = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
    assert {severity for _, severity, _ in said(inspect(content))} == {"warning"}


@pytest.mark.parametrize("updates", [1, 4, 28])
def test_few_updates(inspect, updates):
    torch.manual_seed(updates)
    model = nn.Sequential(nn.Linear(4, 16), BatchNorm(16))
    for _ in range(updates):
        model(torch.randn(8, 4))
    found = inspect(model.state_dict())
    assert said(found) == [("BN102", "warning", "1")]
    assert found.findings[0].evidence == {
        "updates": updates,
        "assumed_momentum": 0.1,
        "initial_share": pytest.approx(0.9**updates),
    }
    assert found.findings[0].message.startswith(f"{updates} update{'s' * (updates > 1)}: ")
    for _ in range(29 - updates):
        model(torch.randn(8, 4))
    assert not inspect(model.state_dict()).findings


def test_few_updates_are_no_reproach_where_the_momentum_was_another(inspect):
    """With momentum 0.1 no variance could be below what is left of the 1 that it began with."""
    model = nn.Sequential(nn.Linear(4, 16), BatchNorm(16, momentum=None))
    nn.init.normal_(model[0].weight, std=0.1)
    for _ in range(8):
        model(torch.randn(8, 4))
    assert float(model[1].running_var.min()) < 0.9**8
    assert not inspect(model.state_dict()).findings
    model[1].num_batches_tracked.fill_(2)  # so few are worth a word even then
    assert said(inspect(model.state_dict())) == [("BN102", "info", "1")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("again", [False, True], ids=["stored", "widened again"])
def test_half_precision(inspect, dtype, again):
    model = nn.Sequential(nn.BatchNorm1d(32, momentum=0.1))
    for _ in range(60):
        model(torch.randn(64, 32) + 100)
    content = model.to(dtype).state_dict()
    if again:
        content = {name: value.to(torch.float32) for name, value in content.items()}
        content["0.num_batches_tracked"] = content["0.num_batches_tracked"].long()
    found = inspect(content)
    assert said(found) == [("BN106", "warning", "0")]
    evidence = found.findings[0].evidence
    mean, var = (content[f"0.running_{k}"].double().numpy() for k in ("mean", "var"))
    half_step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    rounding = (np.abs(mean) / np.sqrt(var + 1e-5)).max() * half_step
    short = str(dtype).removeprefix("torch.")
    assert evidence == {
        "dtype": short,
        "stored": "float32" if again else short,
        "rounding_in_sigma": pytest.approx(rounding),
        "stall_in_sigma": pytest.approx(10 * rounding),
        "channel": int((np.abs(mean) / np.sqrt(var + 1e-5)).argmax()),
        "assumed_momentum": 0.1,
    }
    assert ("are in" in found.findings[0].message) != again
    # The same around zero does no harm.
    content["0.running_mean"] = (content["0.running_mean"] - 100).to(dtype)
    assert {f.severity for f in inspect(content).findings} <= {"info"}


def test_short_numbers_by_chance_are_no_half_precision(inspect):
    few = statistics(running_mean=torch.full((16,), 0.5), running_var=torch.full((16,), 2.0))
    assert not inspect(state(a=few)).findings


def test_mean_and_variance_that_are_no_pair(inspect):
    found = inspect(state(a=statistics(running_var=torch.ones(5)), b=statistics(running_mean=None)))
    assert said(found) == [("BN109", "error", "a"), ("BN109", "error", "b")]
    assert found.findings[0].evidence["shapes"] == {"running_mean": [16], "running_var": [5]}
    assert found.findings[1].evidence["shapes"] == {"running_mean": None, "running_var": [16]}
    assert "(running_mean: missing, running_var: [16])" in found.findings[1].message
    assert [layer.channels for layer in found.layers] == [16, 16]


def test_dead_channels(inspect):
    one = with_value(torch.ones(16), [4], 0)
    found = inspect(state(a=statistics(weight=one)))
    assert said(found) == [("BN304", "info", "a")]
    evidence = dict(found.findings[0].evidence)
    assert evidence.pop("lowest_variance") > 0.5
    assert evidence == {
        "channels": [4],
        "number": 1,
        "of": 16,
        "gamma_zero": 1,
        "lowest_gamma": 0.0,
        "assumed_eps": 1e-5,
    }
    assert "(γ is zero in 1)" in found.findings[0].message
    # What weight decay leaves; and constant inputs: from a quarter of the channels on.
    for name in ("weight", "running_var"):
        for count in (3, 4):
            tiny = with_value(torch.ones(16), range(count), 1e-20)
            found = inspect(state(a=statistics(**{name: tiny})))
            assert len(found.findings) == (count == 4)
        why = {"weight": "γ is next to zero in 4", "running_var": "hardly any variance or γ in 4"}
        assert f"({why[name]})" in found.findings[0].message
    found = inspect(state(a=statistics(weight=torch.full((16,), 1e-9))))
    assert said(found) == [("BN304", "warning", "a")]


def test_gamma_that_is_no_number_is_a_note(inspect):
    found = inspect(state(a=statistics(weight=with_value(torch.ones(16), [3], math.nan))))
    assert not found.findings
    assert "a: γ is not finite in 1 of 16 channels (3): training has diverged." in found.notes
    # And does not hide what else there is: a quarter of the channels is dead.
    gamma = with_value(with_value(torch.ones(16), [3], math.nan), range(4, 8), 1e-20)
    assert said(inspect(state(a=statistics(weight=gamma)))) == [("BN304", "info", "a")]


def test_inputs_below_eps_and_far_from_zero(inspect):
    small = torch.full((16,), 1e-7) * (1 + torch.rand(16))
    found = inspect(state(a=statistics(running_var=small, running_mean=torch.zeros(16))))
    assert said(found) == [("BN306", "info", "a")]
    assert found.findings[0].evidence == {
        "channels": list(range(16)),
        "number": 16,
        "of": 16,
        "median_variance": pytest.approx(float(small.median())),
        "assumed_eps": 1e-5,
    }
    share = float((small.median() / (small.median() + 1e-5)).sqrt())
    assert f"spread is {share:.0%} of γ" in found.findings[0].message
    far = with_value(torch.randn(16), [7], -1e6)
    found = inspect(state(a=statistics(running_mean=far, running_var=torch.full((16,), 4.0))))
    assert said(found) == [("BN307", "warning", "a")]
    evidence = found.findings[0].evidence
    assert evidence["channels"] == [7]
    assert evidence["most_mean_over_sigma"] == pytest.approx(5e5, rel=1e-4)
    assert evidence["rounding_in_sigma"] == pytest.approx(5e5 * 2.0**-24, rel=1e-4)
    # What float32 rounds by less than 0.005 σ is no news.
    far[7] = -1e5
    assert not inspect(
        state(a=statistics(running_mean=far, running_var=torch.full((16,), 4.0)))
    ).findings


def test_a_layer_called_twice_counts_twice(inspect):
    found = inspect(
        state(a=statistics(), b=statistics(), shared=statistics(updates=2000), d=statistics())
    )
    assert said(found) == [("BN206", "info", "shared")]
    assert found.findings[0].evidence == {"updates": 2000, "usual_updates": 1000, "calls": 2}
    # Not a multiple: a part that was added later, or frozen for a while. Known, but no finding.
    found = inspect(state(a=statistics(), b=statistics(), c=statistics(updates=1500)))
    assert not found.findings
    assert any("1000 (2 layers), 1500 (1 layer)" in note for note in found.notes)


def test_averaged_weights_with_copied_statistics(inspect):
    model = state(a=statistics(), b=statistics())
    averaged = {
        f"module.{k}": v + 0.1 if "weight" in k or "bias" in k else v for k, v in model.items()
    }
    found = inspect({"model": model, "model_ema": averaged})
    assert said(found) == [("BN101", "info", "")]
    assert found.findings[0].evidence == {
        "copy": "model_ema",
        "original": "model",
        "layers": 2,
    }
    # The same model twice, and averages that have statistics of their own, are as they should be.
    assert not inspect({"model": model, "model_ema": dict(model)}).findings
    own = {k: v * 1.01 if v.is_floating_point() else v for k, v in averaged.items()}
    assert not inspect({"model": model, "model_ema": own}).findings


def test_banks_are_layers_and_share_gamma(inspect):
    model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8, momentum=0.5))
    with bank(model, "fake"), torch.no_grad():
        for _ in range(40):
            model(torch.randn(8, 4) * 3)
    for _ in range(40):
        model(torch.randn(8, 4))
    with torch.no_grad():
        model[1].weight[2] = 0
        model[1].banks.fake.running_mean[0] = math.nan
    found = inspect(model.state_dict())
    assert [layer.name for layer in found.layers] == ["1", "1.banks.fake"]
    assert said(found) == [
        ("BN103", "error", "1.banks.fake"),
        ("BN304", "info", "1"),
        ("BN304", "info", "1.banks.fake"),
    ]


def test_codes_are_ignored(inspect):
    content = state(a=statistics(running_mean=torch.full((16,), math.nan)))
    assert not inspect(content, ignore=("BN103",)).findings
    with pytest.raises(ArgumentError, match="got 'BN999'"):
        inspect(content, ignore=("BN999",))
    with pytest.raises(ArgumentError, match="got 'BN103'"):
        inspect(content, ignore="BN103")
