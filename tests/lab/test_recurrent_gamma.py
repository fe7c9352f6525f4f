"""The gradient's norm by the state of each step, at initialization."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from batchnorm.lab import training
from batchnorm.lab.data import load
from batchnorm.lab.experiments import Run
from batchnorm.lab.experiments import recurrent_gamma as e
from lab_rehearsal import rehearse

TINY = dataclasses.replace(e.PROFILES["quick"], seeds=2, gammas=(0.1, 1.0), hidden=12, batch=6)


def trial(network, gamma, **fields):
    return e.GammaTrial(
        stage="", network=network, gamma=gamma, **({"seed": 3, "hidden": 12, "batch": 6} | fields)
    )


def test_rehearsal():
    runs, _ = rehearse(e.EXPERIMENT, TINY)
    assert len(runs) == 2 * (3 * 2 + 1)
    assert {len(r.measured["norm"]) for r in runs} == {64}


def standardized(x, gamma):
    return gamma * (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def logits(network, gamma, x, start, w_x, w_h, head, nudge=None):
    """The network written out; `nudge` is (step, row, what is added to the state there)."""
    h, c = start, torch.zeros_like(start)
    for step in range(x.shape[1]):
        seen = x[:, step : step + 1] @ w_x.t()
        heard = h @ w_h.t()
        if network in (e.IDENTITY, e.ORTHOGONAL):
            h = torch.tanh(standardized(seen + heard, gamma))
        else:
            plain = network == e.PLAIN
            gates = (
                seen + heard if plain else standardized(seen, gamma) + standardized(heard, gamma)
            )
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * (c if plain else standardized(c, gamma)).tanh()
        if nudge and nudge[0] == step:
            h = h.clone()
            h[nudge[1]] += nudge[2]
    return h @ head.t()


@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("network", [*e.NETWORKS, e.PLAIN])
def test_norms_are_those_of_differences(network, gamma):
    """Against differences of the loss in float64, of the networks written out."""
    data, t = load("digits"), trial(network, gamma)
    found = e.run(t, data).measured["norm"]
    x, y, _, _ = training.tensors(data)
    draws = torch.Generator().manual_seed(3)
    rows = torch.randperm(len(x), generator=draws)[:6]
    x, y = x[rows].double(), y[rows]
    start = 0.1 * torch.randn(6, 12, generator=draws, dtype=torch.float64)
    head = e.orthogonal(10, 12, draws)
    torch.testing.assert_close(head @ head.t(), torch.eye(10, dtype=torch.float64))
    if network in (e.IDENTITY, e.ORTHOGONAL):
        w_x = e.orthogonal(12, 1, draws)
        w_h = torch.eye(12).double() if network == e.IDENTITY else e.orthogonal(12, 12, draws)
        torch.testing.assert_close(w_h @ w_h.t(), torch.eye(12, dtype=torch.float64))
    else:
        w_x, w_h = (
            torch.empty(48, n, dtype=torch.float64).uniform_(-(12**-0.5), 12**-0.5, generator=draws)
            for n in (1, 12)
        )

    def loss(nudge):
        out = logits(network, gamma, x, start, w_x, w_h, head, nudge)
        return nn.CrossEntropyLoss()(out, y).item()

    for step in (63, 50):
        gradient = torch.zeros(6, 12, dtype=torch.float64)
        for row in range(6):
            for unit in range(12):
                by = torch.zeros(12, dtype=torch.float64)
                by[unit] = 1e-5
                gradient[row, unit] = (loss((step, row, by)) - loss((step, row, -by))) / 2e-5
        # Differences are exact to 1e-10 of the step squared, and to rounding, 1e-16 / 1e-5.
        assert found[step] == pytest.approx(gradient.norm(dim=1).mean().item(), rel=1e-4, abs=1e-9)


def test_networks_of_a_seed_have_the_same_batch_and_noise():
    """The last step's gradient hangs on the head and the last state alone, both of length one."""
    data = load("digits")
    last = [e.run(trial(n, 0.1), data).measured["norm"][-1] for n in (*e.NETWORKS, e.PLAIN)]
    assert max(last) < 1.05 * min(last)


def test_what_is_lost_and_the_span():
    assert e.lost([1.0, 0.01, 0.1]) == pytest.approx(1.0)
    assert e.lost([5.0, 2.0, 1.0]) == 0
    assert e.span([1.0, 0.01, 0.1]) == pytest.approx(2.0)
    assert e.lost([0.0, 1.0]) == pytest.approx(307.65, abs=0.01)


SETTINGS = dataclasses.replace(e.PROFILES["quick"], gammas=(0.1, 0.3, 1.0))


def made_up(fall, rise):
    """Runs whose norm falls and rises by so many decades from 1, by (network, γ)."""
    runs = []
    for t in e.plan(SETTINGS, []):
        key = t.network, t.gamma
        less, more = fall.get(key, 1.0) * (1 + t.seed / 50), rise.get(key, 1.0) * (1 + t.seed / 50)
        runs.append(Run(t, {"norm": [10**more, 10**-less, 1.0]}, {}))
    return runs


@pytest.mark.parametrize(
    ("fall", "rise", "expected"),
    [
        ({}, {}, "uuuuuu"),
        ({(e.IDENTITY, 1.0): 2.0}, {}, "ruuuuu"),
        ({(e.IDENTITY, 1.0): 0.5}, {}, "cuuuuu"),
        ({(e.ORTHOGONAL, 1.0): 2.0}, {(e.ORTHOGONAL, 1.0): 0.0}, "uruuuu"),
        ({(e.ORTHOGONAL, 1.0): 0.5}, {(e.ORTHOGONAL, 1.0): 2.0}, "ucuruu"),
        ({(e.LSTM, 1.0): 0.5}, {(e.LSTM, 1.0): 2.0}, "uucuru"),
        ({}, {(e.LSTM, 1.0): 0.5}, "uuuucu"),
        ({(e.PLAIN, 1.0): 3.0}, {}, "uuuuur"),
        ({(e.PLAIN, 1.0): 0.5}, {}, "uuuuuc"),
    ],
)
def test_each_claim_is_judged_by_its_own_runs(fall, rise, expected):
    found = e.analyse(SETTINGS, made_up(fall, rise))
    outcomes = [found.verdict.outcome, *(other.verdict.outcome for other in found.also)]
    assert "".join(outcome[0] for outcome in outcomes) == expected


def test_numbers_are_those_of_the_runs():
    fall = {(e.IDENTITY, 0.1): 0.5, (e.IDENTITY, 1.0): 2.0, (e.PLAIN, 1.0): 5.0}
    found = e.analyse(SETTINGS, made_up(fall, {(e.ORTHOGONAL, 1.0): 3.0}))
    # The geometric mean over seeds 0…7 is 10 to the mean power, 1.07 times what is given.
    for power in (-0.5, -2.0, -5.0, 3.0):
        assert f"{10 ** (power * 1.07):.2g}" in found.summary, power
    assert "Over 3 steps" in found.summary
    rows = {row[:2]: row[2:] for row in found.table.rows}
    assert rows[e.IDENTITY, "1"] == (f"{10**-2.14:.2g}", f"{10**1.07:.2g}")
    assert rows[e.PLAIN, ""][0] == f"{10**-5.35:.2g}"
    assert found.verdict.mean == pytest.approx(1.5 * 1.07)
    assert math.isclose(found.also[3].verdict.mean, 0, abs_tol=1e-12)


def test_figures_draw_the_norms_and_what_is_lost():
    runs = made_up({(e.LSTM, 0.3): 0.25}, {})
    pictures = {p.name: p.figure.axes[0] for p in e.figures(SETTINGS, runs)}
    assert set(pictures) == {"tanh-identity", "tanh-orthogonal", "lstm", "lost"}
    lines = {line.get_label(): list(line.get_ydata()) for line in pictures["lstm"].get_lines()}
    assert lines["γ = 0.3"] == pytest.approx([10**1.07, 10 ** (-0.25 * 1.07), 1.0], rel=1e-3)
    lost = {line.get_label(): list(line.get_ydata()) for line in pictures["lost"].get_lines()}
    assert lost["LSTM"] == pytest.approx([1.07, 0.25 * 1.07, 1.07])
