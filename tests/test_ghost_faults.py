"""Ghost batches: what is refused, not finite or empty, and what that leaves unchanged."""

import pytest
import torch

from batchnorm import BatchNorm, InputError, NonFiniteWarning, batch_norm

pytestmark = pytest.mark.usefixtures("kernels")

WRONG = [
    # (shape, size, what counts, which group is named)
    ((5, 3), 2, None, "1 in group 2 of 3"),
    ((4, 3), 1, None, "1 in group 0 of 4"),
    ((6, 3, 4), 2, [(2, 1)], "1 in group 1 of 3"),
    ((6, 3, 4), 4, [(4, 0)], "1 in group 1 of 2"),
]


@pytest.mark.parametrize(("shape", "size", "alone", "named"), WRONG)
def test_groups_with_too_few_values_are_refused_before_anything_changes(shape, size, alone, named):
    mask = None
    if alone is not None:
        mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
        start = alone[0][0] // size * size
        mask[start : start + size] = False
        for place in alone:
            mask[place] = True
    for weights in (False, True):
        if weights and mask is None:
            continue
        of_layer = mask.double() if weights else mask
        net = torch.nn.Sequential(BatchNorm(3, virtual_batch_size=size))
        with pytest.raises(InputError, match=rf"(?s)virtual_batch_size samples.*weight of {named}"):
            net[0](torch.randn(shape), of_layer)
        assert net[0].num_batches_tracked == 0
        assert torch.equal(net[0].running_mean, torch.zeros(3))
        assert torch.equal(net[0].running_var, torch.ones(3))


def test_groups_of_one_value_are_refused_compiled_too():
    bn, x = BatchNorm(3, virtual_batch_size=2), torch.randn(5, 3)
    for run in (bn, torch.compile(bn, backend="eager")):
        with pytest.raises(Exception, match="weight of 1 in group 2 of 3"):
            run(x)
    assert bn.num_batches_tracked == 0


def test_a_bad_mask_is_refused_in_the_usual_words():
    x = torch.randn(6, 3)
    for mask, words in [
        (torch.zeros(6, dtype=torch.bool), "at least 2 elements"),
        (-torch.ones(6), "not negative"),
        (torch.full((6,), torch.nan), "finite"),
        (torch.ones(5), "broadcasts"),
    ]:
        with pytest.raises(InputError, match=words):
            batch_norm(x, None, None, training=True, mask=mask, virtual_batch_size=3)


def test_what_raises_afterwards_has_changed_nothing():
    def fails(y):
        raise ValueError

    bn = BatchNorm(3, activation=fails, virtual_batch_size=2)
    with pytest.raises(ValueError):  # noqa: PT011
        bn(torch.randn(6, 3))
    assert bn.num_batches_tracked == 0
    assert torch.equal(bn.running_mean, torch.zeros(3))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_in_one_group_stays_in_it(poison):
    x, dy = torch.randn(2, 9, 3, 5)
    x[4, 1, 2] = poison
    clean = x.clone()
    clean[4, 1, 2] = 0.0
    results = []
    for values in (clean, x):
        bn = BatchNorm(3, virtual_batch_size=3)
        leaf = values.clone().requires_grad_()
        if values is x:
            with pytest.warns(NonFiniteWarning, match=r"1 of 3 channels \(1\)"):
                y = bn(leaf)
        else:
            y = bn(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy), bn))
    (want, d_want, good), (got, d_got, bn) = results
    assert got[3:6, 1].isnan().any()
    touched = torch.zeros(9, 3, dtype=torch.bool)
    touched[3:6, 1] = True
    assert torch.equal(got[~touched], want[~touched])
    assert torch.equal(d_got[~touched], d_want[~touched])
    assert (bn.running_mean[1], bn.running_var[1]) == (0, 1)
    assert torch.equal(bn.running_mean[[0, 2]], good.running_mean[[0, 2]])
    assert torch.equal(bn.running_var[[0, 2]], good.running_var[[0, 2]])
    assert bn.num_batches_tracked == 1


def test_an_empty_batch_is_no_batch():
    """Nor one of NaN: warnings are errors here."""
    for shape, channel_dim in [((0, 3, 4), 1), ((4, 3, 0), 1), ((3, 0), 0), ((0, 4, 3), -1)]:
        bn = BatchNorm(3, virtual_batch_size=2, channel_dim=channel_dim, momentum=None)
        x = torch.randn(shape, requires_grad=True)
        y = bn(x)
        assert y.shape == x.shape
        grads = torch.autograd.grad(y, (x, bn.weight), torch.randn(shape))
        assert grads[0].shape == x.shape
        assert torch.equal(grads[1], torch.zeros(3))
        assert bn.num_batches_tracked == 0
        assert torch.equal(bn.running_mean, torch.zeros(3))
        assert torch.equal(bn.running_var, torch.ones(3))
