"""diagnose on layers that do not train: what does them no harm is no finding."""

import copy

import pytest
from torch import nn

from batchnorm import diagnose, freeze
from settled import data, net, settled


def still(how):
    batches = data(number=16, size=64)
    model = settled(net(), batches)
    how(model)
    return model


def by_hand(model):
    model[1].eval()


for_good = freeze


@pytest.mark.parametrize("how", [by_hand, for_good])
def test_small_batches_do_frozen_layers_no_harm(how):
    model, small = still(how), data(number=16, size=2)
    diagnosis = diagnose(model, small)
    assert diagnosis.findings == ()
    assert (diagnosis.gap.value, diagnosis.layers[0].share) == (0, None)
    free = diagnose(still(lambda model: None), small)
    assert "BN301" in [f.code for f in free.findings]
    # Nor do batches of one, in which a layer that trains would refuse the rehearsal of a step.
    of_one = diagnose(model, data(number=16, size=1))
    assert (of_one.findings, of_one.notes) == ((), ())


@pytest.mark.parametrize("how", [by_hand, for_good])
def test_other_data_in_front_of_frozen_layers_are_good_to_know(how):
    model, others = still(how), [3 * x + 4 for x in data(number=8, size=64)]
    (finding,) = diagnose(model, others).findings
    assert (finding.code, finding.severity) == ("BN101", "info")
    assert "so training and evaluation agree" in finding.message
    free = diagnose(still(lambda model: None), others)
    assert [(f.code, f.severity) for f in free.findings] == [("BN101", "error")]


@pytest.mark.parametrize("how", [by_hand, for_good])
def test_frozen_layers_that_were_never_updated_or_hardly(how):
    model = net()
    how(model)
    batches = [x + 5 for x in data(number=4, size=64)]
    assert [(f.code, f.severity) for f in diagnose(model, batches).findings] == [
        ("BN105", "warning")
    ]
    model = settled(net(), batches, 3)
    how(model)
    assert [(f.code, f.severity) for f in diagnose(model, batches).findings] == [("BN102", "info")]


@pytest.mark.parametrize("tracks", [True, False])
def test_dropout_does_layers_no_harm_whose_statistics_do_not_depend_on_it(tracks):
    batches = data(number=8, size=256)
    norm = nn.BatchNorm1d(6, track_running_stats=tracks)
    model = nn.Sequential(norm, nn.Linear(6, 3))
    settled(model, batches)
    behind = nn.Sequential(nn.Dropout(0.5), *copy.deepcopy(model))
    if tracks:
        assert [f.code for f in diagnose(behind, batches).findings] == ["BN203"]
        behind[1].eval()
    assert diagnose(behind, batches).findings == ()


def test_calls_that_differ_do_layers_no_harm_that_keep_nothing():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](x) + self[0](3 * x + 4)

    model = Twice(nn.BatchNorm1d(6, track_running_stats=False))
    assert diagnose(model, data()).findings == ()
