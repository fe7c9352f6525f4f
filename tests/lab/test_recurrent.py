"""An LSTM with and without batch normalization, and the same one with pooled statistics."""

import dataclasses

import pytest
import torch
from torch import nn

from batchnorm.lab import training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import recurrent as e
from batchnorm.lab.tuning import EVALUATION, SWEEP
from lab_rehearsal import planned, rehearse

TINY = dataclasses.replace(
    e.PROFILES["full"],
    seeds=2,
    tuning_seeds=1,
    rates=(0.3,),
    steps=4,
    every=2,
    hidden=8,
    cases=(e.PERMUTED, e.ORTHOGONAL),
)


def trial(arm, **fields):
    given = {"stage": EVALUATION, "seed": 3, "rate": 0.3, "permuted": True, "orthogonal": False}
    sizes = {"steps": 12, "every": 5, "hidden": 8, "batch": 64, "pixels": 16, "clip": 1.0}
    return e.RecurrentTrial(arm=arm, **(given | sizes | fields))


def test_rehearsal():
    runs, findings = rehearse(e.EXPERIMENT, TINY)
    assert len(runs) == 2 * 3 * (1 + 2)
    assert len(findings.also) == 4


def test_sequences_are_permuted_by_the_seed_all_rows_alike_and_filled_with_zeros():
    rows = torch.arange(1.0, 21.0).view(2, 10)
    plain = e.sequences(trial(e.PLAIN, permuted=False, pixels=4), rows)
    assert plain.shape == (2, 3, 4)
    assert plain[0].flatten().tolist() == [*range(1, 11), 0, 0]
    permuted = e.sequences(trial(e.PLAIN, pixels=4), rows)
    assert torch.equal(permuted, e.sequences(trial(e.SMALL, pixels=4), rows))
    assert not torch.equal(permuted, e.sequences(trial(e.PLAIN, pixels=4, seed=4), rows))
    first, second = permuted.flatten(1)[:, :10]
    assert sorted(first.tolist()) == list(range(1, 11))
    assert torch.equal(second, first + 10)
    assert first.tolist() != list(range(1, 11))


@pytest.mark.parametrize("arm", e.ARMS)
def test_the_sources_start(arm):
    torch.manual_seed(0)
    lstm = e.Reader(trial(arm), 4, 10).lstm
    e.start_orthogonal(lstm)
    eye = torch.eye(8)
    w_x, w_h = lstm.weight_ih_l0.detach(), lstm.weight_hh_l0.detach()
    torch.testing.assert_close(w_x.t() @ w_x, torch.eye(16))
    i, f, g, o = w_h.split(8)
    assert torch.equal(g, eye)
    gates = torch.cat([i, f, o])
    torch.testing.assert_close(gates.t() @ gates, eye)
    # What the gates get from biases, all together: the forget gate hears one.
    biases = [p for name, p in lstm.named_parameters() if "bias" in name and len(p) == 32]
    assert sum(biases).tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16


class Written(nn.Module):
    """The normalized LSTM written out, with the weights of a Reader; `fixed` by step and part."""

    def __init__(self, reader, gamma):
        super().__init__()
        lstm = reader.lstm
        self.w_x, self.w_h, self.head = lstm.weight_ih_l0, lstm.weight_hh_l0, reader.head
        self.gammas = nn.ParameterList([torch.full((n,), gamma) for n in (32, 32, 8)])
        self.bias, self.cell_bias = (nn.Parameter(torch.zeros(n)) for n in (32, 8))
        self.fixed, self.seen = None, {}

    def normalized(self, part, step, x):
        self.seen.setdefault(part, []).append(x.detach())
        if self.fixed is None:
            mean, var = x.mean(0), x.var(0, unbiased=False)
        else:
            mean, var = self.fixed[part][step]
        return (x - mean) / (var + 1e-5).sqrt() * self.gammas[part]

    def forward(self, x):
        h = c = x.new_zeros(len(x), 8)
        for step in range(x.shape[1]):
            seen = self.normalized(0, step, x[:, step] @ self.w_x.t())
            gates = seen + self.normalized(1, step, h @ self.w_h.t()) + self.bias
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (self.normalized(2, step, c) + self.cell_bias).tanh()
        return self.head(h)

    @torch.no_grad()
    def fix(self, parts, pooled):
        """By all rows, which come in these parts."""
        self.fixed, self.seen = None, {}
        for part in parts:
            self(part)
        self.fixed = {}
        for part, inputs in self.seen.items():
            steps = [torch.cat(inputs[step :: len(inputs) // len(parts)]) for step in range(4)]
            steps = [torch.cat(steps)] * 4 if pooled else steps
            self.fixed[part] = [(values.mean(0), values.var(0)) for values in steps]


def right(net, x, y):
    with torch.no_grad():
        return (net(x).argmax(1) == y).double().mean().item()


def trained(net, t, x, y, steps=None):
    optimizer = torch.optim.SGD(net.parameters(), t.rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t.steps)
    for _, rows in zip(
        range(t.steps if steps is None else steps),
        training.batches(len(x), 64, t.seed),
        strict=False,
    ):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), t.clip)
        optimizer.step()
        schedule.step()
    return net


def begun(t):
    with torch.random.fork_rng():
        torch.manual_seed(t.seed)
        return e.Reader(t, 4, 10)


def sequences(t):
    x, y, x_test, y_test = training.tensors(load("digits"))
    return e.sequences(t, x), y, e.sequences(t, x_test), y_test


@pytest.mark.parametrize(("arm", "gamma"), [(e.SMALL, 0.1), (e.ONE, 1.0)])
def test_run_equals_the_same_training_written_out(arm, gamma):
    """Accuracy with statistics of each step and of all, and how far these are from each other."""
    # So low that gradients are cut.
    t = trial(arm, clip=0.2)
    found = e.run(t, load("digits")).measured
    x, y, x_test, y_test = sequences(t)
    net = trained(Written(begun(t), gamma), t, x, y)
    chunks = training.chunks(x)
    net.fix(chunks, pooled=False)
    # float32 rounding, grown over 12 steps; one test row is 0.002.
    assert found["accuracy"] == pytest.approx(right(net, x_test, y_test), abs=0.0061)
    assert found["step"] == [5, 10]
    own = net.fixed
    if arm != e.SMALL:
        assert set(found) == {"accuracy", "step", "accuracies"}
        return
    net.fix(chunks, pooled=True)
    assert found["pooled"] == pytest.approx(right(net, x_test, y_test), abs=0.0061)
    for part, name in enumerate(("input", "hidden", "cell")):
        ratio = [(a[1].mean() / b[1].mean()) ** 0.5 for a, b in zip(own[part], net.fixed[part])]  # noqa: B905
        assert found["spread"][name] == pytest.approx([float(r) for r in ratio], rel=1e-2)


def test_the_plain_network_is_torchs_lstm_and_is_looked_at_as_it_goes():
    t = trial(e.PLAIN)
    found = e.run(t, load("digits")).measured
    x, y, x_test, y_test = sequences(t)

    class Plain(nn.Module):
        def __init__(self, reader):
            super().__init__()
            self.lstm, self.head = nn.LSTM(16, 8, batch_first=True), reader.head
            self.lstm.load_state_dict(reader.lstm.state_dict())

        def forward(self, x):
            return self.head(self.lstm(x)[1][0][0])

    for steps, seen in zip((5, 10, 12), [*found["accuracies"], found["accuracy"]], strict=True):
        with torch.random.fork_rng():
            net = trained(Plain(begun(t)), t, x, y, steps)
        assert seen == pytest.approx(right(net, x_test, y_test), abs=0.0041)


SETTINGS = dataclasses.replace(
    e.PROFILES["full"], tuning_seeds=1, rates=(0.1, 0.3, 1.0), steps=60, every=20
)


def made_up(levels, settings=SETTINGS):
    """Runs that end at these accuracies, by (case, name), 0.6 if none is given."""

    def run(t, _):
        case = next(n for n, c in e.CASES.items() if c[:3] == (t.permuted, t.orthogonal, t.pixels))
        level = levels.get((case, t.arm), 0.6) + t.seed % 8 / 500
        level -= 0.1 * (t.rate != 0.3)
        measured = {"accuracy": level}
        if t.stage == EVALUATION:
            fast = levels.get("fast") == t.arm
            measured |= {"step": [20, 40, 60], "accuracies": [0.1, 0.85 if fast else 0.5, 0.85]}
        if t.arm == e.SMALL and t.stage == EVALUATION:
            pooled = levels.get((case, e.POOLED), 0.6) + t.seed % 8 / 500
            spread = {"input": [0.5, 1.0], "hidden": [0.1, 1.0], "cell": [0.2, 1.5]}
            measured |= {"pooled": pooled, "spread": spread}
        return Run(t, measured, {})

    return planned(dataclasses.replace(e.EXPERIMENT, run=run), settings)


def test_plan_tunes_each_arm_in_each_case():
    runs = made_up({})
    assert len(runs) == 4 * 3 * (3 + 8)
    assert {r.trial.rate for r in runs if r.trial.stage == EVALUATION} == {0.3}
    assert len([r for r in runs if r.trial.stage == SWEEP]) == 36


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({(e.PERMUTED, e.PLAIN): 0.5}, "ruuuuuu"),
        ({(e.PERMUTED, e.PLAIN): 0.7}, "cuuuuuu"),
        ({(e.PERMUTED, e.ONE): 0.5}, "uruuuuu"),
        ({(e.PERMUTED, e.ONE): 0.7}, "ucuuuuu"),
        ({(e.PERMUTED, e.POOLED): 0.5}, "uuruuuu"),
        ({(e.PERMUTED, e.POOLED): 0.7}, "uucuuuu"),
        ({"fast": e.SMALL}, "uuuruuu"),
        ({"fast": e.PLAIN}, "uuucuuu"),
        ({(e.ORDERED, e.PLAIN): 0.5}, "uuuuruu"),
        ({(e.ORTHOGONAL, e.PLAIN): 0.7}, "uuuuucu"),
        ({(e.LONGER, e.PLAIN): 0.5}, "uuuuuur"),
    ],
)
def test_each_claim_is_judged_by_its_own_runs(levels, expected):
    found = e.analyse(SETTINGS, made_up(levels))
    outcomes = [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]
    assert "".join(outcome[0] for outcome in outcomes) == expected


def test_numbers_are_those_of_the_runs():
    levels = {
        (e.PERMUTED, e.PLAIN): 0.51,
        (e.PERMUTED, e.SMALL): 0.72,
        (e.PERMUTED, e.ONE): 0.63,
        (e.PERMUTED, e.POOLED): 0.24,
        (e.ORTHOGONAL, e.PLAIN): 0.85,
    }
    found = e.analyse(SETTINGS, made_up(levels))
    # Seeds 0…7 add 0.7% on average.
    for words in ("51.7%", "72.7%", "24.7%", "63.7%", "plain 85.7%"):
        assert words in found.summary, words
    assert found.table.rows[0] == ("permuted", "plain", "0.3", "51.7% (51.0%–52.4%)")
    assert "these have 2 steps" in found.not_shown[0]
    assert found.caveats == ()
    edges = dataclasses.replace(SETTINGS, rates=(0.3, 1.0))
    assert "plain network, 0.3, is on the edge" in e.analyse(edges, made_up(levels)).caveats[0]


def test_without_the_arm_gamma_one_there_is_no_word_of_it():
    settings = dataclasses.replace(SETTINGS, arms=(e.PLAIN, e.SMALL), cases=(e.PERMUTED,))
    found = e.analyse(settings, made_up({}, settings))
    assert "γ = 1" not in " ".join([found.summary, *(other.claim for other in found.also)])
    assert len(found.also) == 2


def test_steps_to_the_threshold():
    run = Run(trial(e.PLAIN), {"step": [5, 10], "accuracies": [0.7, 0.8]}, {})
    assert (e.steps_to(0.8, run), e.steps_to(0.81, run)) == (10, None)
