import itertools

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm
from batchnorm.errors import InputError
from batchnorm.lab import training
from batchnorm.lab.data import Dataset, load


@pytest.mark.parametrize(
    ("shape", "images", "expected"),
    [
        ((4, 6), False, (4, 6)),
        ((4, 2, 3), False, (4, 6)),
        ((4, 2, 3), True, (4, 1, 2, 3)),
        ((4, 3, 2, 5), True, (4, 3, 2, 5)),
        ((4, 3, 2, 5), False, (4, 30)),
    ],
)
def test_tensors_are_rows_or_images_with_channels(shape, images, expected):
    values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    y = np.arange(8).reshape(2, 4)
    data = Dataset("made up", "", "", 8, values[0], y[0], values[1], y[1])
    x_train, y_train, x_test, y_test = training.tensors(data, images=images)
    assert x_train.shape == x_test.shape == expected
    assert np.array_equal(x_train.numpy().ravel(), values[0].ravel())
    assert np.array_equal(x_test.numpy().ravel(), values[1].ravel())
    assert (y_train.tolist(), y_test.tolist()) == (y[0].tolist(), y[1].tolist())
    assert y_train.dtype == torch.int64


def taken(rows, size, seed, count):
    return [tuple(b.tolist()) for b in itertools.islice(training.batches(rows, size, seed), count)]


def test_batches_are_full_and_go_through_the_rows_in_a_new_order_each_epoch():
    found = taken(200, 60, 3, 6)
    assert [len(b) for b in found] == [60] * 6
    for epoch in (found[:3], found[3:]):
        assert len(set().union(*epoch)) == 180
    assert found[:3] != found[3:]
    assert taken(200, 60, 3, 6) == found
    assert taken(200, 60, 4, 1) != found[:1]
    assert taken(60, 60, 3, 2)[1] != taken(60, 60, 3, 2)[0]  # one batch is the whole epoch


def test_batches_and_weights_are_drawn_apart():
    weights = torch.randperm(100, generator=training.generator(3)).tolist()
    assert taken(100, 100, 3, 1) != [tuple(weights)]
    assert torch.equal(
        torch.rand(3, generator=training.generator(3)),
        torch.rand(3, generator=torch.Generator().manual_seed(3)),
    )


def test_draw_takes_no_row_twice_and_says_what_is_missing():
    found = training.draw(50, 50, training.generator(0))
    assert sorted(found.tolist()) == list(range(50))
    assert len(training.draw(50, 7, training.generator(0))) == 7
    with pytest.raises(InputError, match="at least 51 training rows, which make one batch; got 50"):
        training.draw(50, 51, training.generator(0))
    # An epoch without a full batch would be empty, and the next one too, for ever.
    with pytest.raises(InputError, match="at least 51 training rows"):
        next(training.batches(50, 51, 0))


def net(seed=0):
    layers = [nn.Linear(64, 12), BatchNorm(12), nn.ReLU(), nn.Linear(12, 10)]
    for layer in layers[::3]:
        layer.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
        layer.bias.data.zero_()
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("momentum", "decay"), [(0.9, True), (0.9, False), (0.0, True), (0.0, False)]
)
def test_fit_equals_torchs_own_optimizer_and_schedule(momentum, decay):
    x, y, _, _ = training.tensors(load("digits"))
    ours, torchs = net(), net()
    frozen = ours[0].weight.requires_grad_(False).clone()
    torchs[0].weight.requires_grad_(False)
    losses = training.fit(
        ours, x, y, rate=0.3, steps=7, batch=500, seed=5, momentum=momentum, decay=decay
    )
    optimizer = torch.optim.SGD(torchs.parameters(), 0.3, momentum=momentum)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    torchs.train()
    expected = []
    for rows in itertools.islice(training.batches(len(x), 500, 5), 7):
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(torchs(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
        if decay:
            falling.step()
    assert losses == pytest.approx(expected, rel=1e-5)
    for a, b in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours[0].weight, frozen)
    assert all(module.training for module in ours.modules())
    assert losses[-1] < losses[0]


def regression(x, y, *, steps, batch, seed, arrange, clip, rate=0.5, momentum=0.9):
    """Softmax regression by hand, in NumPy; return losses, weights, and the gradients' norms."""
    weights, speed = np.zeros((3, x.shape[1])), 0.0
    losses, norms = [], []
    for rows in itertools.islice(training.batches(len(x), batch, seed), steps):
        chosen = arrange(rows).numpy()
        inputs, classes = x[chosen], y[chosen]
        scores = np.exp(inputs @ weights.T)
        shares = scores / scores.sum(1, keepdims=True)
        right = np.eye(3)[classes]
        losses.append(-np.log((shares * right).sum(1)).mean())
        gradient = (shares - right).T @ inputs / len(inputs)
        norms.append(np.linalg.norm(gradient))
        gradient = gradient * min(1.0, clip / norms[-1])
        speed = momentum * speed + gradient
        weights = weights - rate * speed
    return losses, weights, norms


@pytest.mark.parametrize("clip", [np.inf, 0.3])
@pytest.mark.parametrize("arrange", [None, lambda rows: rows[rows % 3 == 0].sort().values])
def test_fit_arranges_rows_and_clips_gradients_as_by_hand(arrange, clip):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 4)), rng.integers(0, 3, 90)
    net = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(net.weight)
    options = {"steps": 12, "batch": 30, "seed": 4}
    seen = []
    losses = training.fit(
        net,
        torch.tensor(x),
        torch.tensor(y),
        rate=0.5,
        decay=False,
        arrange=arrange,
        clip=clip,
        after=lambda step: seen.append((step, net.weight.detach().clone())),
        **options,
    )
    by_hand = regression(x, y, arrange=arrange or (lambda rows: rows), clip=clip, **options)
    assert losses == pytest.approx(by_hand[0], rel=1e-5)
    # torch divides by the norm plus 1e-6.
    np.testing.assert_allclose(net.weight.detach().numpy(), by_hand[1], rtol=1e-4, atol=1e-6)
    # Some gradients are cut and some are not, or it would not matter where the bound is.
    assert any(norm > 0.3 for norm in by_hand[2])
    if clip == 0.3:
        assert any(norm < 0.3 for norm in by_hand[2])
    assert [step for step, _ in seen] == list(range(1, 13))
    # Called when the step is done: the first one's weights are no longer the start's.
    first = regression(
        x, y, arrange=arrange or (lambda rows: rows), clip=clip, **{**options, "steps": 1}
    )
    np.testing.assert_allclose(seen[0][1].numpy(), first[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(seen[-1][1], net.weight)


def test_fit_goes_on_with_the_network_that_the_caller_changed():
    x, y = torch.eye(3).repeat(5, 1), torch.arange(3).repeat(5)
    net = nn.Linear(3, 3, bias=False)

    def forget(step):
        if step == 2:
            nn.init.zeros_(net.weight)

    losses = training.fit(net, x, y, rate=0.1, steps=3, batch=15, seed=0, after=forget)
    assert losses[2] == pytest.approx(np.log(3), rel=1e-6)
    assert losses[1] != pytest.approx(np.log(3), rel=1e-3)


class Scores(nn.Module):
    """Takes its input for the scores, in evaluation only, and remembers the sizes of its calls."""

    def __init__(self):
        super().__init__()
        self.inner, self.sizes = nn.Dropout(), []

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.sizes.append(len(x))
        return self.inner(x)


def test_accuracy_is_the_share_of_right_rows_a_thousand_at_a_time():
    x = torch.rand(2300, 5, generator=torch.Generator().manual_seed(0))
    y = x.argmax(1)
    y[[0, 999, 1000, 2299]] += 1
    scores = Scores()
    assert training.accuracy(scores, x, y) == 2296 / 2300
    assert scores.sizes == [1000, 1000, 300]


def test_accuracy_leaves_modes_as_they_were_even_if_the_network_raises():
    model = nn.Sequential(BatchNorm(4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[0].eval()
    running = model[0].running_mean.clone()
    training.accuracy(model, torch.ones(6, 4), torch.zeros(6, dtype=torch.int64))
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert torch.equal(model[0].running_mean, running)
    with pytest.raises(InputError, match="got 3"):
        training.accuracy(model, torch.ones(6, 3), torch.zeros(6, dtype=torch.int64))
    assert [m.training for m in model.modules()] == [True, False, True, True]


def test_saved_bytes_are_those_of_the_graph_counted_by_hand():
    x = torch.randn(8, 5)
    first, second = nn.Linear(5, 7), nn.Linear(7, 3)
    net = nn.ModuleList([first, second])
    inputs, hidden = 8 * 5 * 4, 8 * 7 * 4
    assert training.saved_bytes(net, lambda: first(x)) == inputs
    # The ReLU keeps its output, which is the second layer's input: one storage, once. The second
    # layer keeps its weight too, for the gradient by its input; weights do not count.
    assert training.saved_bytes(net, lambda: second(first(x).relu())) == inputs + hidden
    outputs = 8 * 3 * 4
    assert (
        training.saved_bytes(net, lambda: second(first(x).relu()).sigmoid())
        == inputs + hidden + outputs
    )
    leaf = torch.randn(100, requires_grad=True)
    assert training.saved_bytes(net, lambda: leaf * leaf) == 400
    assert training.saved_bytes(net, leaf.exp) == 400
    with torch.no_grad():
        assert training.saved_bytes(net, lambda: second(first(x).relu())) == 0


def test_saved_bytes_count_all_of_a_storage_that_a_view_keeps():
    net, scale = nn.Module(), torch.randn(4, requires_grad=True)
    whole = torch.randn(6, 4)
    assert training.saved_bytes(net, lambda: scale * whole[0]) == 6 * 4 * 4
    assert training.saved_bytes(net, lambda: scale * whole[0] + scale * whole[1]) == 6 * 4 * 4
