"""BN107, and layers that share statistics, in real processes."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from batchnorm import ArgumentError, BatchNorm, SyncError, diagnose, sync_statistics
from batchnorm.tools.diagnosis.modes import processes_of
from batchnorm.tools.diagnosis.processes import check_processes
from processes import launch, leave


def net(norm=nn.BatchNorm1d, **options):
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 4, bias=False),
        norm(4, **options),
        nn.ReLU(),
        nn.Linear(4, 4, bias=False),
    ]
    return nn.Sequential(*layers, norm(4, **options), nn.Linear(4, 2))


def settle(model, batches):
    with torch.no_grad():
        for x in batches * 8:
            model(x)
    return model


def own(rank, number=4, size=32):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, 6, generator=generator) for _ in range(number)]


# --- what each process does ----------------------------------------------------------------------


def findings(diagnosis):
    return [(f.code, f.layer, dict(f.evidence)) for f in diagnosis.findings]


def different(rank):
    """One process further from the first in one layer; then the remedy."""
    model = settle(net(), own(0))
    model[4].running_mean += rank * model[4].running_var.sqrt()
    model[4].running_var *= 3**rank
    before = findings(diagnose(model, own(0), process_group="world", ignore=("BN101",)))
    sync_statistics(model)
    after = findings(diagnose(model, own(0), process_group="world", ignore=("BN101",)))
    return before, after


def alike(rank):
    """The same but for rounding."""
    model = settle(net(), own(0))
    for layer in (model[1], model[4]):
        layer.running_mean *= 1 + rank * 1e-7
    return findings(diagnose(model, own(0), process_group="world"))


def not_finite(rank, where):
    model = settle(net(), own(0))
    if where in (rank, "all"):
        model[1].running_var[2] = torch.nan
    return [(f.code, f.layer) for f in check_processes(model, "world")]


def other_model(rank):
    model = net() if rank else nn.Sequential(nn.BatchNorm1d(7))
    try:
        diagnose(model, own(0), process_group="world")
    except SyncError as error:
        return str(error)
    return ""


def shared(rank, world):
    """Layers with the statistics of all: two samples here, which are few by themselves."""
    size = 8 // world
    batches = own(rank, 10, size)
    model = settle(net(BatchNorm, process_group="world", momentum=None), batches)
    if rank:  # each would order the layers by another drift
        batches = [5 * x for x in batches]
    diagnosis = diagnose(model, batches)
    single = settle(net(momentum=None), batches)
    few = [f.evidence["effective"] for f in diagnose(single, batches).findings if f.code == "BN301"]
    measured = [layer.gap is not None for layer in diagnosis.layers]
    codes = [f.code for f in diagnosis.findings]
    return codes, measured, [processes_of(m) for m in model], few


def distributed_alone(rank):
    """A model in DistributedDataParallel, which each process diagnoses by itself, or does not.

    Their statistics differ; nobody may wait for the others, nor look at theirs.
    """
    model = settle(net(momentum=None), own(rank))
    model[1].running_mean += rank
    wrapped = nn.parallel.DistributedDataParallel(model)
    before = wrapped.require_forward_param_sync, wrapped.require_backward_grad_sync
    model[1].running_mean.copy_(10 * rank * torch.ones(4))
    if rank == 1:
        return None
    diagnosis = diagnose(wrapped, own(rank))
    after = wrapped.require_forward_param_sync, wrapped.require_backward_grad_sync
    first = diagnosis.layers[0].mean_drift
    wrapped.eval()  # as in a training loop: else the first process waits for the others here
    return first, before == after, list(diagnosis.notes)


def work(rank, world, folder):
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    results = {
        "different": different(rank),
        "alike": alike(rank),
        "one": not_finite(rank, world - 1),
        "first": not_finite(rank, 0),
        "all": not_finite(rank, "all"),
        "other": other_model(rank),
        "shared": shared(rank, world),
        "nobody": check_processes(
            nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "world"
        ),
        "alone": distributed_alone(rank),
    }
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


# --- what is to be seen --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for status, output in launch(Path(__file__), request.param, folder):
        assert status == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.slow
def test_processes_that_differ(results):
    world = len(results)
    for result in results:
        ((code, layer, evidence),) = result["different"][0]
        assert (code, layer) == ("BN107", "4")
        assert evidence["mean_apart"] == pytest.approx(world - 1, rel=1e-5)
        assert evidence["log_var_apart"] == pytest.approx((world - 1) * 1.0986123, rel=1e-5)
        assert evidence["processes"] == world
        assert result["different"][1] == []  # sync_statistics repairs it
        assert result["alike"] == []


@pytest.mark.slow
def test_nan_in_one_process_is_a_difference_and_in_all_is_none(results):
    for result in results:
        assert result["one"] == result["first"] == [("BN107", "1")]
        assert result["all"] == []
        assert result["nobody"] == []


@pytest.mark.slow
def test_another_model_is_refused_everywhere(results):
    assert all(result["other"] for result in results)


@pytest.mark.slow
def test_shared_statistics(results):
    """Processes measure the same layers, and few samples are enough if there are many of them."""
    world = len(results)
    for result in results:
        codes, measured, processes, few = result["shared"]
        assert "BN301" not in codes
        assert measured == [True, True]
        assert processes == [1, world, 1, 1, world, 1]
        assert few == [8 // world] * 2


@pytest.mark.slow
def test_nobody_waits_for_others_in_data_parallel_training(results):
    for rank, result in enumerate(results):
        if rank == 1:
            assert result["alone"] is None
            continue
        drift, same, notes = result["alone"]
        assert same
        assert notes == []  # also the rehearsal of a training step needed nobody
        assert drift > 5 * rank  # σ is about 0.6: the statistics looked at are its own


def test_alone_there_is_nothing_to_compare():
    model = net()
    assert check_processes(model, "world") == []
    assert check_processes(model, None) == []
    with pytest.raises(ArgumentError, match="process_group"):
        diagnose(model, own(0), process_group="everyone")


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
