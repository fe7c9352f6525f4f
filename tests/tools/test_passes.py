"""The order of layers, and in how many passes, of networks that are no chain."""

import copy

import pytest
import torch
from torch import nn

import oracle
from batchnorm import BatchNorm, InputError, recalibrate


def stats(layer):
    return torch.stack([layer.running_mean, layer.running_var])


def incoming(model, batches, layers, step=None):
    """What comes into layers in evaluation, all calls of each together."""
    found = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: found[layer].append(args[0]))
        for layer in layers
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            (step or (lambda model, batch: model(batch)))(model, batch)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def assert_consistent(model, batches, step=None):
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer, x in incoming(model, batches, layers, step).items():
        _, mean, _, unbiased, _ = oracle.moments(x)
        want = torch.from_numpy(oracle.np.stack([mean, unbiased]).astype(float))
        torch.testing.assert_close(stats(layer), want, rtol=1e-11, atol=1e-12)


class Count(nn.Identity):
    """How often it is reached."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def chain(n=4):
    parts = []
    for _ in range(n):
        parts += [nn.Linear(3, 3), BatchNorm(3), nn.Tanh(), Count()]
    return nn.Sequential(*parts).double()


def test_a_pass_ends_at_the_layer_that_it_is_for():
    model, batches = chain(), torch.randn(12, 3, dtype=torch.float64).split(4)
    report = recalibrate(model, batches, method="layerwise")
    assert report.passes == 4
    # The first pass goes through all of it; that for layer k ends before what follows layer k.
    assert [model[4 * k + 3].calls for k in range(4)] == [12, 9, 6, 3]
    assert_consistent(model, batches)


class TwoInputs(nn.Module):
    """One network for both inputs; every layer is called twice, but never gets its own output."""

    def __init__(self):
        super().__init__()
        self.net = chain(3)

    def forward(self, x):
        return self.net(x[:, 0]) - self.net(x[:, 1])


def test_two_inputs_through_one_network():
    model = TwoInputs()
    batches = (torch.randn(14, 2, 3, dtype=torch.float64) * 2 + 1).split(5)
    report = recalibrate(model, batches, method="layerwise")
    assert [layer.calls for layer in report.layers] == [2, 2, 2]
    assert report.layers[0].values == 28
    assert [layer.batches for layer in report.layers] == [3, 3, 3]
    assert_consistent(model, batches)


def test_a_step_that_runs_the_model_twice_is_the_same():
    def step(model, batch):
        return model(batch[:, 0]), model(batch[:, 1])

    x = torch.randn(14, 2, 3, dtype=torch.float64)
    model = chain(3)
    recalibrate(model, x.split(5), method="layerwise", step=step)
    assert_consistent(model, x.split(5), step)


def test_an_empty_call_is_none():
    """A batch whose first input has no rows: the second input's call is the only one."""

    def step(model, batch):
        return model(batch[:0]), model(batch)

    model, batches = chain(3), torch.randn(12, 3, dtype=torch.float64).split(4)
    report = recalibrate(model, batches, method="layerwise", step=step)
    assert [(layer.calls, layer.batches) for layer in report.layers] == [(1, 3)] * 3
    assert report.passes == 3
    assert_consistent(model, batches)


class Loop(nn.Module):
    """Its output comes back to it: no statistics are known to be consistent before they are."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Linear(3, 3), BatchNorm(3)

    def forward(self, x):
        for _ in range(3):
            x = self.bn(self.first(x)).tanh()
        return x


@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_a_loop_pools_all_rounds_of_batches_that_are_normalised_by_themselves(method):
    model = Loop().double()
    batches, every = torch.randn(12, 3, dtype=torch.float64).split(6), []
    with torch.no_grad():
        for batch in batches:
            x = batch
            for _ in range(3):
                h = model.first(x)
                every.append(h)
                x = ((h - h.mean(0)) / (h.var(0, correction=0) + model.bn.eps).sqrt()).tanh()
    report = recalibrate(model, batches, method=method)
    assert (report.layers[0].calls, report.passes) == (3, 1)
    want = torch.cat(every)
    torch.testing.assert_close(stats(model.bn), torch.stack([want.mean(0), want.var(0)]))


class Routes(nn.Module):
    """Batches take the layers that their sign says, or leave one out."""

    def __init__(self, reverse=False):
        super().__init__()
        self.a, self.b, self.c = (BatchNorm(3) for _ in range(3))
        self.reverse = reverse

    def forward(self, x):
        way = [self.a, self.c]
        if x[0, 0] > 0:
            way = [self.c, self.a] if self.reverse else [self.a, self.b, self.c]
        for layer in way:
            x = layer(x).sin()
        return x


def signed(*signs):
    batches = torch.randn(len(signs), 6, 3, dtype=torch.float64)
    for batch, sign in zip(batches, signs, strict=True):
        batch[0, 0] = sign
    return list(batches)


@pytest.mark.parametrize("signs", [(-1, 1, -1), (1, -1, 1)])
def test_a_layer_that_some_batches_leave_out_comes_before_what_follows_it(signs):
    """Whichever kind of batch is the first."""
    model, batches = Routes().double(), signed(*signs)
    report = recalibrate(model, batches, method="layerwise")
    assert report.passes == 3
    assert [layer.batches for layer in report.layers] == [3, signs.count(1), 3]
    assert_consistent(model, batches)


def test_layers_of_which_a_batch_takes_only_one_share_a_pass():
    class Domains(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = chain(3), chain(3)

        def forward(self, x):
            return self.one(x) if x[0, 0] > 0 else self.other(x)

    model, batches = Domains(), signed(1, -1, -1, 1, 1)
    assert recalibrate(model, batches, method="layerwise").passes == 3
    assert_consistent(model, batches)


def test_layers_that_come_in_both_orders_are_refused_layerwise():
    model, batches = Routes(reverse=True).double(), signed(1, -1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        InputError, match=r"in one order, got a circle: 'a', 'c', 'a'|'c', 'a', 'c'"
    ):
        recalibrate(model, batches, method="layerwise")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    recalibrate(model, batches)


def test_shuffling_and_augmentation_repeat_in_every_pass():
    """So the result is consistent with the data of any one of them."""

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.full((3,), float(index), dtype=torch.float64) + torch.randn(3).double()

    model, seen = chain(), []

    def step(model, batch):
        seen.append(batch)
        return model(batch)

    loader = torch.utils.data.DataLoader(Noisy(), 6, shuffle=True)
    state = torch.get_rng_state()
    assert recalibrate(model, loader, method="layerwise", step=step).passes == 4
    assert torch.equal(torch.get_rng_state(), state)
    passes = [torch.cat(seen[4 * k : 4 * k + 4]) for k in range(4)]
    assert all(torch.equal(other, passes[0]) for other in passes[1:])
    assert_consistent(model, seen[:4])


class Once:
    """Says that it can be gone through again, and is empty then."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        while self.batches:
            yield self.batches.pop()


def test_passes_that_differ_are_refused():
    model, batches = chain(), torch.randn(12, 3, dtype=torch.float64).split(4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="the same batches in each pass, got 3, then 0"):
        recalibrate(model, Once(batches), method="layerwise")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    recalibrate(model, Once(batches))
