"""diagnose on models that do more than compute: nothing of it reaches the user's own things."""

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, InputError, bank, diagnose, recalibrate
from settled import data, net, settled


def state(model):
    return {name: (id(t), t.tolist()) for name, t in model.state_dict(keep_vars=True).items()}


class Merging(nn.Linear):
    """As layers of low-rank adaptation: train() and eval() take its weights apart and together."""

    def __init__(self):
        super().__init__(6, 8, bias=False)
        self.more, self.merged = nn.Parameter(torch.randn(8, 6)), False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.more.data * (-1 if self.merged else 1)
            self.merged = not self.merged
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.more.T


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_modes_merge_stay_as_they_are(training):
    batches = data()
    model = settled(nn.Sequential(Merging(), nn.BatchNorm1d(8), nn.Linear(8, 3)), batches)
    model.train(training)
    before, merged = state(model), model[0].merged
    assert diagnose(model, batches).findings == ()
    assert (state(model), model[0].merged, model[0].training) == (before, merged, training)


def test_an_optimizer_that_steps_in_the_backward_pass_does_not():
    batches = data()
    model, steps = settled(net(), batches), []
    for parameter in model.parameters():
        own = torch.optim.SGD([parameter], 0.1)

        def step(p, own=own):
            steps.append(p)
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    before = state(model)
    diagnosis = diagnose(model, batches)
    assert diagnosis.notes == ()  # the rehearsal took place
    assert (state(model), steps) == (before, [])
    model(batches[0]).square().mean().backward()
    assert len(steps) == 5  # they are all there again


def test_buffers_that_nobody_can_write_to():
    batches = data()
    model = settled(net(), batches)
    plain = diagnose(model, batches)
    model.register_buffer("repeated", torch.ones(1).expand(5))
    model.register_buffer("turned", torch.zeros(3, 2, 1).permute(2, 1, 0))
    before = state(model)
    assert diagnose(model, batches) == plain
    assert state(model) == before


def test_what_is_written_past_autograd_is_put_back():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.codes.data += 1
            self.none.data += 1
            return super().forward(x)

    batches = data()
    model = Counting(*settled(net(), batches))
    model.register_buffer("codes", torch.tensor([1.0, float("nan")]))
    model.register_buffer("none", torch.zeros(()))
    for tool in (diagnose, recalibrate):
        tool(model, batches)
        assert model.codes.tolist()[0] == 1
        assert model.none == 0


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchNorm])
@pytest.mark.parametrize("training", [True, False])
def test_a_backward_pass_that_is_still_to_come(norm, training):
    batches = data()
    model = settled(net(norm), batches).train(training)
    output = model(batches[0]).square().sum()
    diagnose(model, batches)
    output.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(batches[0]).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_gradients_that_nobody_can_write_to():
    batches = data()
    model = settled(net(), batches)
    gradient = model[3].bias.grad = torch.ones(1).expand(3)
    assert diagnose(model, batches).notes == ()
    assert model[3].bias.grad is gradient


def test_a_model_of_inference_mode():
    batches = data()
    with torch.inference_mode():
        model = settled(net(), batches)
    before = state(model)
    assert diagnose(model, batches).findings == ()
    assert state(model) == before
    with torch.inference_mode():
        model[1].running_mean += 5
    moved = diagnose(model, batches)
    assert [f.code for f in moved.findings] == ["BN101"]
    assert moved.gap.recalibrated < moved.gap.value / 2


def test_the_same_noise_in_all_passes_whoever_makes_it():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.tensor(np.random.randn(len(x), 3)).float()

    batches = data(number=8)
    model = settled(Noisy(*net()), batches, 200)
    with torch.no_grad():
        model[1].running_mean.zero_()
        for x in batches:
            model[1].running_mean += model[0](x).mean(0) / len(batches)
    assert diagnose(model, batches).gap.value < 0.1  # unlike the noises, which are 1.4 apart


def test_a_model_that_draws_lots_goes_all_ways():
    class Lots(nn.Module):
        def __init__(self):
            super().__init__()
            self.ways = nn.ModuleList(net() for _ in range(2))

        def forward(self, x):
            return self.ways[int(torch.randint(2, ()))](x)

    batches = data(number=16)
    diagnosis = diagnose(settled(Lots(), batches, 200), batches)
    assert diagnosis.findings == ()
    calls = [layer.calls for layer in diagnosis.layers]
    assert sum(calls) == 1
    assert min(calls) > 0
    assert diagnosis.gap.value < 0.5  # each batch goes the same way in training and evaluation


def test_empty_batches_are_left_out():
    batches = data()
    model = settled(net(), batches)
    plain = diagnose(model, batches)
    with_empty = diagnose(model, [torch.randn(0, 6), *batches, torch.randn(0, 6)])
    assert with_empty.notes == ("2 of 6 batches were left out: their output is empty",)
    assert (with_empty.gap, with_empty.layers) == (plain.gap, plain.layers)
    with pytest.raises(InputError, match="batches with something in them, got 2"):
        diagnose(model, [torch.randn(0, 6)] * 2)


def test_a_call_with_nothing_is_none():
    class Some(nn.Module):
        """Its second layer gets what is large, if anything is."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)

        def forward(self, x):
            y = self.first(x)
            large = x[:, 0] > 0
            return y.index_put((large,), self.second(x[large]))

    rest = [torch.randn(64, 6) for _ in range(4)]
    for x in rest[:2]:
        x[:, 0] = -x[:, 0].abs()
    first, second = diagnose(settled(Some(), rest), rest).layers
    assert (first.calls, second.calls) == (1, 0.5)
    assert second.values == sum(int((x[:, 0] > 0).sum()) for x in rest) / 2


def test_buffers_of_banks_are_looked_at():
    batches = data()
    model = settled(net(BatchNorm), batches)
    other = bank(model, "other")
    with other:
        settled(model, batches)
    assert diagnose(model, batches).findings == ()
    model[1].banks["other"].running_var[3] = -1
    (finding,) = diagnose(model, batches).findings
    assert (finding.code, finding.layer) == ("BN104", "1.banks.other")
    assert finding.layer in dict(model.named_modules())


def test_a_layer_of_training_alone_is_no_finding():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = net(), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.body(x)
            return y + self.head(y) if self.training else y

    batches = data()
    model = settled(Auxiliary(), batches)
    diagnosis = diagnose(model, batches)
    assert diagnosis.findings == ()
    assert diagnosis.notes == ("layer 'head' is reached in training only, and was not looked at",)
    model.requires_grad_(False)  # no backward pass, but a forward pass all the same
    assert diagnose(model, batches).findings == ()


def test_of_one_batch_nothing_is_said_of_others():
    batches = data(number=1)
    gap = diagnose(settled(net(), batches), batches).gap
    assert gap.recalibrated is None
    assert np.isnan(gap.error)
