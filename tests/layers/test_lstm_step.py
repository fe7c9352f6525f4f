"""A step as one node of autograd is the step in torch's operations, gradients of any order too."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm, BatchNormLSTM, NonFiniteWarning, pause_statistics
from batchnorm.kernels import native
from batchnorm.layers import lstm_step
from batchnorm.layers.lstm_step import step_of
from batchnorm.layers.steps import add_steps, along

CHANNELS, LENGTH = 3, 3

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason="without the kernels, no node")


def layers(momentum=0.1, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    found = []
    for channels in (4 * CHANNELS, CHANNELS):
        norm = BatchNorm(channels, momentum=momentum, bias=bias)
        add_steps(norm, LENGTH)
        with torch.no_grad():
            norm.weight.uniform_(0.3, 1)
        found.append(norm.to(dtype))
    return found


def given(number, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    shapes = (number, 4 * CHANNELS), (number, 4 * CHANNELS), (number, CHANNELS)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def steps(norms, sizes, dtype=torch.float64):
    hidden, cell = (along(norm, sizes, len(sizes), LENGTH) for norm in norms)
    z, x, c = given(sizes[0], dtype)
    return step_of(hidden, cell, x, c), hidden, cell


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_node_is_the_operations(momentum, bias, dtype):
    """By the batch; and by running statistics, once one sequence goes on."""
    sizes = [6, 6, 4, 2, 1]
    results = []
    for one_node in (True, False):
        norms = layers(momentum, bias, dtype)
        take, hidden, cell = steps(norms, sizes, dtype)
        assert take.func is lstm_step._one_node
        if not one_node:
            take = step_of(None, None, *given(6, dtype)[1:])
            take = type(take)(lstm_step._by_operations, hidden, cell)
        found = []
        for step, number in enumerate(sizes):
            inputs = given(number, dtype)
            h, c = take(step, *inputs)
            leaves = [*inputs, *(p for norm in norms for p in norm.parameters())]
            found += [h, c, *torch.autograd.grad((h, c), leaves, (h.sin(), c.cos()))]
        results.append([*found, *(b for norm in norms for b in norm.buffers())])
    exact = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else {}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_of_both_orders(mode):
    norms = [getattr(norm, mode)() for norm in layers()]
    take, *_ = steps(norms, [4, 4])
    parameters = [p for norm in norms for p in norm.parameters()]

    def run(z, x, c, *_):
        with pause_statistics(torch.nn.ModuleList(norms)):
            return take(1, z, x, c)

    inputs = (*given(4), *parameters)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_only_what_learns_gets_a_gradient():
    norms = layers()
    norms[0].weight.requires_grad_(False)
    norms[1].bias.requires_grad_(False)
    take, *_ = steps(norms, [4, 4])
    z, x, c = given(4)
    h, _ = take(0, z, x, c.detach())
    assert h.grad_fn.name() == "_NodeBackward"
    h.sum().backward()
    assert norms[0].weight.grad is None
    assert norms[1].bias.grad is None
    assert norms[0].bias.grad is not None
    assert norms[1].weight.grad is not None


def test_what_is_not_finite_is_told_and_kept_out():
    norms = layers()
    take, *_ = steps(norms, [4, 4])
    z, x, c = (t.detach() for t in given(4))
    z[0, 1] = torch.inf
    with pytest.warns(NonFiniteWarning) as told:
        take(0, z, x, c)
    assert {str(t.message).partition(":")[0] for t in told} == {"BatchNorm(12)", "BatchNorm(3)"}
    assert len(told) == 2
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        take(1, z, x, c)
    assert all(b.isfinite().all() for norm in norms for b in norm.buffers())
    assert norms[0].banks["step0"].num_batches_tracked == 1


def test_a_weight_changed_in_place_is_noticed():
    norms = layers()
    take, *_ = steps(norms, [4, 4])
    h, _ = take(0, *given(4))
    with torch.no_grad():
        norms[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("why", ["mixed dtypes", "autocast", "hook", "no batch statistics"])
def test_what_it_is_not_for(why):
    norms = layers(dtype=torch.float32)
    z, x, c = given(4, torch.float32)
    if why == "hook":
        norms[1].register_forward_hook(lambda *_: None)
    if why == "no batch statistics":
        for norm in norms:
            norm.eval().requires_grad_(False)
    hidden, cell = (along(norm, [4], 1, LENGTH) for norm in norms)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        take = step_of(hidden, cell, x, c.double() if why == "mixed dtypes" else c)
    assert take.func is lstm_step._by_operations


@pytest.mark.parametrize("refused", [0, 1])
def test_what_the_kernels_refuse_is_refused_as_ever(refused):
    norms = layers()
    norms[refused].eps = 0.0  # nobody may say so
    take, *_ = steps(norms, [4, 4])
    with pytest.raises(Exception, match="eps > 0"):
        take(0, *given(4))
    # By the operations the hidden state's comes before the cell's, and counts.
    assert counted(norms[0]) == refused
    assert counted(norms[1]) == 0


def counted(norm):
    """How many batches all steps of a layer together have taken in."""
    return sum(int(buffer) for buffer in norm.buffers() if not buffer.is_floating_point())


def test_a_cell_that_the_kernels_leave_to_others_counts_the_hidden_state_once():
    norms = layers()
    twins = copy.deepcopy(norms)
    take, *_ = steps(norms, [4, 4])
    for bank in (norms[1], *norms[1].banks.values()):
        bank.running_mean = bank.running_mean.bfloat16()
        bank.running_var = bank.running_var.bfloat16()
    hidden, cell = (along(norm, [4, 4], 2, LENGTH) for norm in norms)
    lstm_step._one_node(hidden, cell, 0, *given(4))
    hidden, cell = (along(norm, [4, 4], 2, LENGTH) for norm in twins)
    lstm_step._by_operations(hidden, cell, 0, *given(4))
    for a, b in zip(norms[0].buffers(), twins[0].buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert counted(norms[0]) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_network(reentrant):
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 4, max_length=3, num_layers=2, bidirectional=True).double()
    twin = copy.deepcopy(lstm)
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    y, _ = checkpoint(lstm, x, use_reentrant=reentrant)
    z, _ = twin(x)
    y.sin().sum().backward()
    z.sin().sum().backward()
    for a, b in zip(lstm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(lstm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_that_can_be_differentiated_are_the_same_gradients(mode):
    """Steps share γ and β, and each leads back to those before: no way may be taken twice."""
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 4, max_length=5, num_layers=2, bidirectional=True).double()
    getattr(lstm, mode)()
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *lstm.parameters()]
    y, (_, c) = lstm(x)
    loss = y.sin().sum() + c.cos().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for place, dy in enumerate(cotangents):
        alone = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[place], b, rtol=1e-9, atol=1e-12)


def test_a_whole_network_has_second_derivatives():
    torch.manual_seed(0)
    lstm = BatchNormLSTM(2, 2, max_length=3).double()
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        with pause_statistics(lstm):
            return lstm(x)[0]

    assert torch.autograd.gradgradcheck(run, (x, *lstm.parameters()))
