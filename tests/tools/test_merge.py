"""sync_statistics in real processes, two and three, against sums by hand in float64."""

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from batchnorm import ArgumentError, BatchNorm, SyncError, bank, sync_statistics
from processes import launch, leave

#: Batches of each process in each of the rounds between two calls. The second has none at first.
ROUNDS = [(3, 0, 2), (1, 4, 2), (0, 0, 1), (0, 0, 0), (2, 1, 1)]
MOMENTA = [0.1, None]
KINDS = {"ours": BatchNorm, "torch's": nn.BatchNorm1d}


def batch(rank, index, step):
    """Each process has data of another mean, which moves by far more than it spreads."""
    generator = torch.Generator().manual_seed(1000 * rank + 100 * index + step)
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    return x * (1 + rank) + 5 * rank + 50 * index


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- what each process does ----------------------------------------------------------------------


def rounds(rank, kind, momentum):
    """The state before and after each call."""
    layer, left = KINDS[kind](3, momentum=momentum, dtype=torch.float64), []
    for index, steps in enumerate(ROUNDS):
        for step in range(steps[rank]):
            layer(batch(rank, index, step))
        left.append(state(layer))
        sync_statistics(layer)
        left.append(state(layer))
    return left


def identical(rank):
    """Bits that a weighted mean of equal numbers could lose."""
    layer = BatchNorm(3)
    for step in range(3):
        layer(batch(0, 0, step).float())
    left = [state(layer)]
    for _ in range(2):
        sync_statistics(layer, "world")
        left.append(state(layer))
    return left


def banks(rank):
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    fake = bank(model, "fake", affine=True)
    with torch.no_grad():
        model[0].banks.fake.weight.fill_(rank)
    for step in range(rank + 1):
        model(batch(rank, 0, step))
    with fake:
        model(batch(rank, 1, 0))
    before = state(model)
    sync_statistics(model)
    return [before, state(model)]


def skipped(rank):
    """One layer keeps no statistics, the activation of another has its own."""
    activation = nn.Sequential(nn.PReLU(), nn.BatchNorm1d(3))
    model = nn.Sequential(
        BatchNorm(3, track_running_stats=False), nn.BatchNorm1d(3, track_running_stats=False),
        BatchNorm(3, activation=activation),
    ).double()  # fmt: skip
    for step in range(rank + 1):
        model(batch(rank, 0, step))
    before = state(model)
    sync_statistics(model)
    return [before, state(model)]


def uncounted(rank):
    """Old checkpoints have no counter: all processes are worth the same, each time."""
    layer = BatchNorm(3, dtype=torch.float64)
    layer.num_batches_tracked = None
    left = []
    for index in range(2):
        for step in range(rank + 1):
            layer(batch(rank, index, step))
        left.append(state(layer))
        sync_statistics(layer)
        left.append(state(layer))
    return left


def changed(rank):
    """By other means than batches, after they had been the same."""
    layer = BatchNorm(3, dtype=torch.float64)
    layer(batch(rank, 0, 0))
    sync_statistics(layer)
    layer.running_mean += rank
    before = state(layer)
    sync_statistics(layer)
    return [before, state(layer)]


MANY = 10


def restarted(rank, how, momentum):
    """After a reset, or other values, what was shared before is none of theirs."""
    layer = BatchNorm(3, momentum=momentum, dtype=torch.float64)
    for step in range(2):
        layer(batch(rank, 0, step))
    sync_statistics(layer)
    if how.startswith("reset"):
        layer.reset_running_stats()
    else:
        other = BatchNorm(3, momentum=momentum, dtype=torch.float64)
        for step in range(20):
            other(batch(0, 0, step))
        layer.load_state_dict(other.state_dict())
        if how == "loaded":
            sync_statistics(layer)
    # In one case there are then more batches than were shared.
    for step in range(rank + 1 + (MANY if how == "reset, then many" else 0)):
        layer(batch(rank, 1, step))
    before = state(layer)
    sync_statistics(layer)
    return [before, state(layer)]


def subgroup(rank):
    """A group of the first two; others go on alone."""
    group = distributed.new_group([0, 1])
    layer = BatchNorm(3, dtype=torch.float64)
    layer(batch(rank, 0, 0))
    before = state(layer)
    if rank < 2:
        sync_statistics(layer, group)
    return [before, state(layer)]


def of_channels(*channels, **options):
    return nn.Sequential(*(BatchNorm(n, **options) for n in channels))


def of_banks(*names):
    model = of_channels(3)
    for name in names:
        bank(model, name)
    return model


#: Of all processes but the last, and of the last.
DIFFERENT = {
    "channels": (lambda: of_channels(3), lambda: of_channels(4)),
    "layers": (lambda: of_channels(3, 3), lambda: of_channels(3)),
    "order": (lambda: of_channels(3, 5), lambda: of_channels(5, 3)),
    # As many numbers, and the same sum of k·Cₖ.
    "sizes": (lambda: of_channels(2, 4, 2), lambda: of_channels(3, 2, 3)),
    "banks": (lambda: of_banks("fake"), of_banks),
    "order of banks": (lambda: of_banks("fake", "real"), lambda: of_banks("real", "fake")),
    "momentum": (lambda: of_channels(3), lambda: of_channels(3, momentum=None)),
    "statistics": (lambda: of_channels(3), lambda: of_channels(3, track_running_stats=False)),
}


def different(rank, world, name):
    """The error's text; the model must be as before, and the next call works."""
    model = DIFFERENT[name][rank == world - 1]()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(rank)
    before = state(model)
    try:
        sync_statistics(model)
    except SyncError as error:
        message = str(error)
    else:
        message = ""
    return message, all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def work(rank, world, folder):
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    results = {
        f"rounds {kind} {momentum}": rounds(rank, kind, momentum)
        for kind in KINDS
        for momentum in MOMENTA
    }
    for function in (identical, banks, skipped, uncounted, changed, subgroup):
        results[function.__name__] = function(rank)
    for how in ("reset", "reset, then many", "loaded", "loaded and not told"):
        for momentum in MOMENTA:
            results[f"restarted {how} {momentum}"] = restarted(rank, how, momentum)
    for name in DIFFERENT:
        results[f"different {name}"] = different(rank, world, name)
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


# --- what must come of it ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """results[rank][case]."""
    folder = tmp_path_factory.mktemp("merge")
    for status, output in launch(__file__, request.param, folder):
        assert status == 0, output
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)
    ]


def mixture(weights, means, variances):
    """Mean and variance of a mixture, by its definition."""
    total = sum(weights)
    mean = sum(w * m for w, m in zip(weights, means, strict=True)) / total
    within = sum(w * v for w, v in zip(weights, variances, strict=True)) / total
    between = sum(w * (m - mean) ** 2 for w, m in zip(weights, means, strict=True)) / total
    return mean, within + between


def assert_mixture(results, case, weights, total, prefix="", at=(0, 1)):
    before = [result[case][at[0]] for result in results]
    mean, var = mixture(
        weights,
        [s[f"{prefix}running_mean"] for s in before],
        [s[f"{prefix}running_var"] for s in before],
    )
    for result in results:
        after = result[case][at[1]]
        # float64, sums of three terms.
        torch.testing.assert_close(after[f"{prefix}running_mean"], mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(after[f"{prefix}running_var"], var, rtol=1e-13, atol=0)
        if total is not None:
            assert after[f"{prefix}num_batches_tracked"] == total


def assert_same_bits(results, case, at, names=("running_mean", "running_var")):
    first = results[0][case][at]
    for result in results[1:]:
        assert all(torch.equal(result[case][at][name], first[name]) for name in names)


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_weighted_by_the_batches_since_the_last_time(results, kind):
    """And the number of batches is the true one, however often it is done."""
    case, total = f"rounds {kind} 0.1", 0
    for index, everyones in enumerate(ROUNDS):
        steps = everyones[: len(results)]
        total += sum(steps)
        assert_same_bits(results, case, 2 * index + 1)
        if sum(steps):
            assert_mixture(results, case, steps, total, at=(2 * index, 2 * index + 1))
        for result in results:
            before, after = result[case][2 * index : 2 * index + 2]
            assert after["num_batches_tracked"] == total
            if not sum(steps):
                assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_averages_of_all_batches_on_all_processes(results, kind):
    """The mean is that of one process; the variance has what lies between processes besides."""
    case = f"rounds {kind} None"
    done: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    means = []
    for index, steps in enumerate(ROUNDS):
        parts = []
        for rank, count in enumerate(steps[: len(results)]):
            batches = [batch(rank, index, step) for step in range(count)]
            means += [b.mean(0) for b in batches]
            if count:
                average = (torch.stack([f(b) for b in batches]).mean(0) for f in (mean_of, var_of))
                parts.append((count, *average))
        if parts:
            weights, *values = zip(*parts, strict=True)
            done.append((sum(weights), *mixture(weights, *values)))
        total = sum(n for n, *_ in done)
        mean = torch.stack(means).mean(0)
        var = sum(n * v for n, _, v in done) / total
        assert_same_bits(results, case, 2 * index + 1)
        after = results[0][case][2 * index + 1]
        # float64; the parts come out of averages up to 200 with a loss of two digits, squared.
        torch.testing.assert_close(after["running_mean"], mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(after["running_var"], var, rtol=1e-11, atol=0)
        assert after["num_batches_tracked"] == total == len(means)


def mean_of(x):
    return x.mean(0)


def var_of(x):
    return x.var(0)


def test_identical_processes_keep_every_bit(results):
    for result in results:
        before, *after = result["identical"]
        for again in after:
            assert all(torch.equal(again[name], before[name]) for name in before)


def test_banks_take_part(results):
    world = len(results)
    counts = range(1, world + 1)
    assert_mixture(results, "banks", counts, sum(counts), "0.")
    assert_mixture(results, "banks", [1] * world, world, "0.banks.fake.")
    # Parameters are no statistics.
    own = [result["banks"][1]["0.banks.fake.weight"].tolist() for result in results]
    assert own == [[rank] * 3 for rank in range(world)]


def test_layers_without_statistics_are_skipped_and_none_counts_twice(results):
    counts = range(1, len(results) + 1)
    for prefix in ("2.", "2.activation.1."):
        assert_mixture(results, "skipped", counts, sum(counts), prefix)


def test_without_a_counter_all_are_worth_the_same(results):
    for at in ((0, 1), (2, 3)):
        assert_mixture(results, "uncounted", [1] * len(results), None, at=at)


def test_what_differs_without_a_batch_is_worth_the_same(results):
    world = len(results)
    assert_mixture(results, "changed", [1] * world, world)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_reset_forgets_what_was_shared(results, momentum):
    counts = range(1, len(results) + 1)
    assert_mixture(results, f"restarted reset {momentum}", counts, sum(counts))
    counts = [MANY + count for count in counts]
    assert_mixture(results, f"restarted reset, then many {momentum}", counts, sum(counts))


@pytest.mark.parametrize("momentum", MOMENTA)
def test_loading_forgets_what_was_shared(results, momentum):
    """The number of batches cannot tell: there are more than before."""
    counts = range(21, len(results) + 21)
    assert_mixture(results, f"restarted loaded and not told {momentum}", counts, sum(counts))


@pytest.mark.parametrize("momentum", MOMENTA)
def test_what_was_loaded_on_all_counts_once(results, momentum):
    counts = range(1, len(results) + 1)
    case = f"restarted loaded {momentum}"
    if momentum is not None:
        assert_mixture(results, case, counts, 20 + sum(counts))
        return
    shared = [batch(0, 0, step) for step in range(20)]
    parts = [[batch(rank, 1, step) for step in range(n)] for rank, n in enumerate(counts)]
    every = [b.mean(0) for b in (*shared, *(b for part in parts for b in part))]
    _, new = mixture(
        counts,
        [sum(b.mean(0) for b in part) / len(part) for part in parts],
        [sum(b.var(0) for b in part) / len(part) for part in parts],
    )
    old = sum(b.var(0) for b in shared) / 20
    var = (20 * old + sum(counts) * new) / (20 + sum(counts))
    after = results[0][case][1]
    torch.testing.assert_close(after["running_mean"], sum(every) / len(every), rtol=1e-13, atol=0)
    torch.testing.assert_close(after["running_var"], var, rtol=1e-11, atol=0)
    assert after["num_batches_tracked"] == 20 + sum(counts)


def test_a_group_of_some(results):
    assert_mixture(results[:2], "subgroup", [1, 1], 2)
    for result in results[2:]:
        before, after = result["subgroup"]
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", DIFFERENT)
def test_models_that_differ_are_refused_everywhere(results, name):
    for result in results:
        message, unchanged = result[f"different {name}"]
        assert message.startswith("expected the same batch norm layers, with the same banks")
        assert unchanged


@pytest.mark.parametrize("kind", KINDS)
def test_alone_nothing_happens(kind):
    layer = KINDS[kind](3)
    layer(torch.randn(6, 3))
    before = state(layer)
    sync_statistics(layer)
    sync_statistics(layer, "world")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_what_is_no_group():
    with pytest.raises(ArgumentError, match="expected process_group to be None"):
        sync_statistics(BatchNorm(3), "everyone")


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
