"""forward_together: what is refused, and by which layer's name; what an error leaves behind."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm import (
    ArgumentError,
    BatchNorm,
    InputError,
    NonFiniteWarning,
    accumulate_statistics,
    bank,
    forward_together,
    pause_statistics,
)
from micro_batches import SPLIT, Block, buffers, close, data, switches, together, unchanged

pytestmark = pytest.mark.usefixtures("kernels", "no_thread_stays")


def test_an_error_in_one_is_the_callers():
    model, x = Block(), data()
    before, state = buffers(model), switches(model)

    def step(net, part):
        y = net(part)
        if len(part) == 1:
            raise ZeroDivisionError("of the second micro-batch")
        return y

    with pytest.raises(ZeroDivisionError, match="of the second"):
        forward_together(model, x.split(SPLIT), step=step)
    assert unchanged(model, before)
    assert switches(model) == state
    twin = copy.deepcopy(model)
    close([together(model, x, None)], [twin(x)], 1e-12)


def test_those_left_waiting_clean_up_behind_themselves():
    model, x, seen = Block(), data(), []

    def step(net, part):
        try:
            if len(part) == 4:
                raise ZeroDivisionError
            return net(part)
        except Exception:
            seen.append("caught")
            raise
        finally:
            seen.append(len(part))

    with pytest.raises(ZeroDivisionError):
        forward_together(model, x.split(SPLIT), step=step)
    # The others do not take their end for an error of the model's.
    assert seen == ["caught", 4, 7, 1]


def test_different_paths():
    model, x = Block(), data()
    before, state = buffers(model), switches(model)

    def step(net, part):
        return net.first(net.lift(part)) if len(part) > 1 else net.twice(net.lift(part))

    with pytest.raises(InputError, match="same batch norm layers in one order, got one at Batch"):
        forward_together(model, x.split(SPLIT), step=step)
    with pytest.raises(InputError, match=r"one at BatchNorm.*, one done"):
        forward_together(
            model, x.split(SPLIT), step=lambda net, p: net(p) if len(p) > 1 else net.lift(p)
        )
    # One ends where the others pass the same layer again.
    with pytest.raises(InputError, match=r"one at BatchNorm.*, one done"):
        forward_together(
            nn.Sequential(model.twice),
            torch.randn(12, 3, 5, dtype=torch.float64).split(SPLIT),
            step=lambda net, p: net(net(p)) if len(p) > 1 else net(p),
        )
    assert unchanged(model, before)
    assert switches(model) == state


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_within_is_refused(reentrant):
    model, x = Block(), data().requires_grad_()
    before = buffers(model)

    def step(net, part):
        return checkpoint(net, part, use_reentrant=reentrant)

    for offload in (False, True):
        with pytest.raises(InputError, match=r"layer 'first'.*offload=True"):
            forward_together(model, x.split(SPLIT), step=step, offload=offload)
    assert unchanged(model, before)


def test_ghost_batches_are_refused_by_name():
    model = nn.Sequential(BatchNorm(3), BatchNorm(3, virtual_batch_size=2))
    with pytest.raises(ArgumentError, match=r"without virtual_batch_size.*at '1'"):
        forward_together(model, [torch.randn(4, 3)])


def test_one_value_in_all_is_refused_by_name_and_two_are_not():
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    x, before = torch.randn(2, 3, dtype=torch.float64), buffers(model)
    with pytest.raises(InputError, match=r"layer '0'.*more than 1 value per channel"):
        forward_together(model, [x[:1]])
    assert unchanged(model, before)
    twin = copy.deepcopy(model)
    close([torch.cat(forward_together(model, x.split(1)))], [twin(x)], 1e-14)


def test_bad_input_names_the_layer():
    model = nn.Sequential(BatchNorm(3))
    with pytest.raises(InputError, match=r"layer '0'.*3 channels"):
        forward_together(model, [torch.randn(4, 3), torch.randn(4, 2)])
    with pytest.raises(InputError, match="weights that are finite and not negative"):
        forward_together(
            model, [torch.randn(4, 3)] * 2, step=lambda net, x: net[0](x, -torch.ones(4))
        )


def test_nan_is_refused_by_its_channel_with_a_warning():
    model = nn.Sequential(BatchNorm(3, dtype=torch.float64))
    x = torch.randn(12, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin(x)
    x[8, 1] = torch.nan
    with pytest.warns(NonFiniteWarning, match=r"layer '0', BatchNorm\(3\).*1 of 3 channels \(1\)"):
        forward_together(model, x.split(SPLIT))
    expected = torch.where(torch.tensor([True, False, True]), twin[0].running_mean, 0.0)
    close([model[0].running_mean], [expected], 1e-14)
    assert model[0].running_var[1] == 1


@pytest.mark.parametrize("tool", [pause_statistics, accumulate_statistics, "bank"])
def test_switches_within_a_step_are_refused(tool):
    """Micro-batches take turns: one would switch for all, and in no order of its own."""
    model = nn.Sequential(BatchNorm(3))
    fake = bank(model, "fake")

    def step(net, part):
        with fake if tool == "bank" else tool(net):
            return net(part)

    before, state = buffers(model), switches(model)
    with pytest.raises(InputError, match=r"layer '0'.*around forward_together"):
        forward_together(model, torch.randn(12, 3).split(SPLIT), step=step)
    assert unchanged(model, before)
    assert switches(model) == state


def test_one_within_another_is_refused():
    model = nn.Sequential(BatchNorm(3))
    with pytest.raises(ArgumentError, match="one forward_together at a time"):
        forward_together(
            model, [torch.randn(4, 3)] * 2, step=lambda net, x: forward_together(net, [x])
        )
