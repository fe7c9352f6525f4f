"""Recalibration over real processes, two and three, against one process that has all batches."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import BatchNorm, InputError, SyncError, recalibrate, sync_statistics
from processes import launch, leave

#: How many batches each process has; the second has none.
BATCHES = (3, 0, 2)
METHODS = ["batch", "layerwise"]
MAKE = {
    "ours": BatchNorm,
    "shared": lambda n: BatchNorm(n, process_group="world"),
    "plain average": lambda n: BatchNorm(n, momentum=None),
    "torch's": nn.BatchNorm1d,
    "torch's sync": nn.SyncBatchNorm,
}


def network(kind):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(3, 4), MAKE[kind](4), nn.Tanh(), nn.Linear(4, 4), MAKE[kind](4)
    ).double()  # fmt: skip


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(4 + 2 * step, 3, dtype=torch.float64, generator=generator) * (1 + rank) + rank
        for step in range(BATCHES[rank])
    ]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- what each process does ----------------------------------------------------------------------


def pooled(rank, kind, method):
    model = network(kind)
    report = recalibrate(model, batches(rank), method=method, process_group="world")
    after = state(model)
    sync_statistics(model)  # all have the same, and of the batches' number there is one
    return after, report.to_dict(), state(model)


def trained_after(rank):
    """What was pooled counts once when the processes' statistics are merged, some batches later."""
    layer = BatchNorm(3, momentum=None).double()
    recalibrate(layer, batches(rank), process_group="world")
    for _ in range(rank + 1):
        layer(torch.randn(4, 3, dtype=torch.float64))
    sync_statistics(layer)
    return state(layer)


def apart_after(rank):
    """Each recalibrates alone: nothing that they shared before is theirs any more."""
    layer = BatchNorm(3, momentum=None).double()
    layer(torch.randn(4, 3, dtype=torch.float64))
    sync_statistics(layer)
    recalibrate(layer, torch.randn(40, 3, dtype=torch.float64).split(4 + rank))
    sync_statistics(layer)
    return state(layer)


def alone(rank, kind):
    """Without a group nobody waits for anybody, whatever layers share in training."""
    model = network(kind)
    if rank == 0:
        recalibrate(model, batches(rank), method="layerwise")
    return state(model)


def parallel(rank, method):
    """What DistributedDataParallel wraps would broadcast its buffers in every forward pass."""
    model = network("ours")
    wrapped = DistributedDataParallel(model)
    recalibrate(wrapped, batches(rank), method=method, process_group="world")
    return state(model), wrapped.require_forward_param_sync


def some_layers(rank, method):
    """Only the last process comes to the second layer."""
    model = network("ours")
    last = rank == distributed.get_world_size() - 1
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    run = (lambda model, batch: model(batch)) if last else (lambda model, batch: model[:2](batch))
    report = recalibrate(model, [x + rank], method=method, step=run, process_group="world")
    return state(model), report.to_dict()


def poisoned(rank):
    """One process has NaN; all go without that batch, and all are told."""
    model = BatchNorm(3).double()
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    if rank == 0:
        x[2, 1] = torch.nan
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        recalibrate(model, [x], process_group="world")
    return x, state(model), [str(w.message) for w in told]


def refused(rank, kind):
    """What is raised; the model must be as before."""
    model = network("ours")
    if kind == "frozen on one" and rank == 0:
        model[1]._frozen = True
    before = state(model)
    mine = [] if kind == "nothing" else [torch.randn(4, 3, dtype=torch.float64)]
    method = "layerwise" if kind == "method" and rank == 0 else "batch"
    try:
        recalibrate(model, mine, method=method, process_group="world")
    except (SyncError, InputError) as error:
        return type(error).__name__, str(error), unchanged(model, before)
    return None


def subgroup(rank):
    group = distributed.new_group([0])
    model = network("ours")
    recalibrate(model, batches(0), process_group=group if rank == 0 else None)
    return state(model)


class Broken:
    """Batches of which, on the first process, some pass ends in an error."""

    def __init__(self, rank, at, error):
        self.rank, self.left, self.error = rank, at, error

    def __iter__(self):
        yield from batches(0)
        self.left -= 1
        if self.rank == 0 and self.left == 0:
            raise self.error


def failed(rank, at, error=ZeroDivisionError, **options):
    """The first process has an error in its data; all raise, and nobody waits."""
    model = network("ours")
    before = state(model)
    try:
        recalibrate(model, Broken(rank, at, error), process_group="world", **options)
    except (SyncError, error) as raised:
        return type(raised).__name__, str(raised), unchanged(model, before)
    return None


def work(rank, world, folder):
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    results = {}
    for kind in MAKE:
        for method in METHODS:
            results[f"pooled {kind} {method}"] = pooled(rank, kind, method)
        results[f"alone {kind}"] = alone(rank, kind)
    for method in METHODS:
        results[f"parallel {method}"] = parallel(rank, method)
        results[f"some {method}"] = some_layers(rank, method)
    for function in (trained_after, apart_after):
        results[function.__name__] = function(rank)
    results["poisoned"] = poisoned(rank)
    for kind in ("method", "frozen on one", "nothing"):
        results[f"refused {kind}"] = refused(rank, kind)
    results["subgroup"] = subgroup(rank)
    # Each process goes on with what comes next, and the others are there, too.
    results["failed"] = [
        failed(rank, 1), failed(rank, 1, method="layerwise"), failed(rank, 2, method="layerwise"),
    ]  # fmt: skip
    results["after failures"] = pooled(rank, "ours", "batch")[0]
    # No error that a tool should keep: the process leaves, and is waited for.
    results["lost"] = failed(rank, 1, KeyboardInterrupt)
    torch.save(results, folder / f"rank{rank}.pt")


# --- what must come of it ------------------------------------------------------------------------

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """results[rank][case]."""
    folder = tmp_path_factory.mktemp("recalibrate")
    for status, output in launch(__file__, request.param, folder):
        assert status == 0, output
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)
    ]


def of_one_process(kind, method, ranks):
    model = network(kind)
    every = [batch for rank in range(ranks) for batch in batches(rank)]
    report = recalibrate(model, every, method=method)
    return state(model), report


def assert_close(got, want):
    """float64; the order of merging differs."""
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


def assert_same_bits(states):
    for other in states[1:]:
        assert all(torch.equal(other[name], value) for name, value in states[0].items())


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("method", METHODS)
def test_as_one_process_with_all_batches(results, kind, method):
    want, report = of_one_process(kind, method, len(results))
    every = [result[f"pooled {kind} {method}"] for result in results]
    assert_same_bits([after for after, *_ in every])
    for after, found, merged in every:
        assert_close(after, want)
        assert (found["batches"], found["passes"]) == (report.batches, report.passes)
        for got, expected in zip(found["layers"], report.to_dict()["layers"], strict=True):
            words = ("name", "kind")
            assert all(got[name] == expected[name] for name in words)
            numbers = {name: value for name, value in expected.items() if name not in words}
            assert {name: got[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)
        assert all(torch.equal(merged[name], after[name]) for name in after)


def test_what_was_pooled_counts_once_in_later_merges(results):
    world = len(results)
    pooled = sum(BATCHES[:world])
    for result in results:
        total = result["trained_after"]["num_batches_tracked"]
        assert total == pooled + sum(range(1, world + 1))


def test_what_was_shared_before_is_forgotten(results):
    counts = [-(-40 // (4 + rank)) for rank in range(len(results))]
    for result in results:
        assert result["apart_after"]["num_batches_tracked"] == sum(counts)


@pytest.mark.parametrize("kind", MAKE)
def test_without_a_group_each_is_alone(results, kind):
    want, _ = of_one_process(kind, "layerwise", 1)
    assert_close(results[0][f"alone {kind}"], want)
    for result in results[1:]:
        assert_close(result[f"alone {kind}"], state(network(kind)))


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel_models(results, method):
    want, _ = of_one_process("ours", method, len(results))
    for result in results:
        after, broadcasts = result[f"parallel {method}"]
        assert_close(after, want)
        assert broadcasts is True


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_one_process_reaches(results, method):
    after = [result[f"some {method}"][0] for result in results]
    assert_same_bits(after)
    world = len(results)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    model = network("ours")

    def step(model, batch):
        return model(batch[0]) if batch[1] == world - 1 else model[:2](batch[0])

    every = [(x + rank, rank) for rank in range(world)]
    report = recalibrate(model, every, method=method, step=step)
    assert_close(after[0], state(model))
    assert [layer.batches for layer in report.layers] == [world, 1]


def test_poison_on_one_process(results):
    every = torch.cat([result["poisoned"][0] for result in results])
    after = [result["poisoned"][1] for result in results]
    assert_same_bits(after)
    sound = every[6:, 1]
    want = torch.stack([every[:, 0].mean(), sound.mean(), every[:, 2].mean()])
    torch.testing.assert_close(after[0]["running_mean"], want)
    for result in results:
        (told,) = result["poisoned"][2]
        assert "in 1 of 3 channels (1)" in told


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("method", "SyncError", "expected the same method and the same batch norm layers"),
        ("frozen on one", "SyncError", "expected the same method and the same batch norm layers"),
        ("nothing", "InputError", "expected at least one batch, got none"),
    ],
)
def test_refused_by_all(results, kind, error, words):
    for result in results:
        name, message, as_before = result[f"refused {kind}"]
        assert name == error
        assert message.startswith(words)
        assert as_before


def test_a_group_of_one_is_alone(results):
    want, _ = of_one_process("ours", "batch", 1)
    assert_close(results[0]["subgroup"], want)


def test_an_error_on_one_process_is_one_on_all(results):
    for case in range(3):
        names = [result["failed"][case][0] for result in results]
        assert names == ["ZeroDivisionError"] + ["SyncError"] * (len(results) - 1)
        for result in results[1:]:
            assert (
                "got an error on some, which they have raised (ranks in the group: 0)"
                in (result["failed"][case][1])
            )
        assert all(result["failed"][case][2] for result in results)
    want, _ = of_one_process("ours", "batch", len(results))
    for result in results:
        assert_close(result["after failures"], want)


def test_a_process_that_is_lost_leaves_all_models_as_they_were(results):
    names = [result["lost"][0] for result in results]
    assert names == ["KeyboardInterrupt"] + ["SyncError"] * (len(results) - 1)
    for result in results[1:]:
        assert "to call recalibrate; one did not" in result["lost"][1]
    assert all(result["lost"][2] for result in results)


def test_a_copy_of_the_model_is_as_good():
    """What is remembered of sharing does not keep a model from being copied."""
    model = network("ours")
    recalibrate(model, batches(0), process_group="world")
    assert_close(state(copy.deepcopy(model)), state(model))


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
