"""BatchNormLSTM against NumPy in float64, and against torch.nn.LSTM."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from batchnorm import (
    ArgumentError,
    BatchNormLSTM,
    InputError,
    accumulate_statistics,
    bank,
    freeze,
    pause_statistics,
    recalibrate,
    unfreeze,
)
from batchnorm.layers.recurrent import PARTS, _reversal

MOMENTUM, EPS = 0.1, 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Oracle:
    """One layer, one direction, sequence by sequence where it can be: the definition."""

    def __init__(self, lstm, index=0, suffix="_l0"):
        self.weights = [
            getattr(lstm, f"weight_{name}{suffix}").detach().numpy() for name in ("ih", "hh")
        ]
        self.norms = lstm.norms[index]
        self.length = lstm.max_length
        self.running = {
            part: (
                np.zeros((self.length, norm.num_features)),
                np.ones((self.length, norm.num_features)),
            )
            for part, norm in self.norms.items()
        }

    def normalize(self, part, x, step, training):
        if part not in self.norms:
            return x
        norm, slot = self.norms[part], min(step, self.length - 1)
        mean, var = self.running[part]
        if training and len(x) >= 2:
            m, v = x.mean(0), x.var(0)
            mean[slot] += MOMENTUM * (m - mean[slot])
            var[slot] += MOMENTUM * (x.var(0, ddof=1) - var[slot])
            self.reached = max(getattr(self, "reached", 0), step + 1)
        else:
            slot = min(slot, getattr(self, "reached", self.length) - 1)
            m, v = mean[slot], var[slot]
        y = (x - m) / np.sqrt(v + EPS) * norm.weight.detach().numpy()
        return y + (0 if norm.bias is None else norm.bias.detach().numpy())

    def __call__(self, sequences, training):
        """Outputs and last states of sequences (length, channels) of any lengths."""
        w_ih, w_hh = self.weights
        hidden = w_hh.shape[1]
        h = np.zeros((len(sequences), hidden))
        c = np.zeros((len(sequences), hidden))
        outputs = [[] for _ in sequences]
        for step in range(max(map(len, sequences))):
            on = [k for k, s in enumerate(sequences) if len(s) > step]
            x = np.stack([sequences[k][step] for k in on])
            gates = self.normalize("input", x @ w_ih.T, step, training)
            gates = gates + self.normalize("hidden", h[on] @ w_hh.T, step, training)
            i, f, g, o = np.split(gates, 4, 1)
            c[on] = sigmoid(f) * c[on] + sigmoid(i) * np.tanh(g)
            h[on] = sigmoid(o) * np.tanh(self.normalize("cell", c[on], step, training))
            for place, k in enumerate(on):
                outputs[k].append(h[on][place])
        return [np.stack(y) for y in outputs], h, c


def make(*args, seed=0, **options):
    torch.manual_seed(seed)
    lstm = BatchNormLSTM(*args, **options).double()
    with torch.no_grad():
        for norm in lstm._every_norm():
            norm.weight.uniform_(0.2, 1)
            if norm.bias is not None:
                norm.bias.normal_()
    return lstm


def statistics(norm, length):
    """(length, C) running means, variances and counters, as kept step by step."""
    keepers = [norm.banks[f"step{t}"] for t in range(length - 1)] + [norm]
    names = ("running_mean", "running_var", "num_batches_tracked")
    return [np.stack([getattr(keeper, name).numpy() for keeper in keepers]) for name in names]


@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    parts=st.sets(st.sampled_from(PARTS), min_size=1),
    max_length=st.integers(1, 7),
)
@settings(max_examples=40, deadline=None)
def test_outputs_states_and_statistics_are_the_definitions(lengths, parts, max_length):
    lstm = make(
        3, 4, normalize=parts, max_length=max_length, bias=bool(parts & {"hidden", "input"})
    )
    oracle = Oracle(lstm)
    packed_lengths = torch.tensor(lengths)
    for round_ in range(3):
        training = round_ < 2
        lstm.train(training)
        x = torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64)
        sequences = [x[:n, k].numpy() for k, n in enumerate(lengths)]
        expected, h, c = oracle(sequences, training)
        packed = pack_padded_sequence(x, packed_lengths, enforce_sorted=False)
        output, (h_n, c_n) = lstm(packed)
        padded, _ = pad_packed_sequence(output)
        for k, n in enumerate(lengths):
            np.testing.assert_allclose(padded[:n, k].detach(), expected[k], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(h_n[0].detach(), h, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(c_n[0].detach(), c, rtol=1e-9, atol=1e-12)
    enough = [sum(n > t for n in lengths) >= 2 for t in range(max(lengths))]
    for part, norm in lstm.norms[0].items():
        mean, var, count = statistics(norm, max_length)
        np.testing.assert_allclose(mean, oracle.running[part][0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(var, oracle.running[part][1], rtol=1e-6, atol=1e-7)
        times = np.zeros(max_length, int)
        for step, there in enumerate(enough):
            times[min(step, max_length - 1)] += 2 * there
        assert count.tolist() == times.tolist()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_mask_is_packing(batch_first, bidirectional):
    """Wherever its gaps are, what it leaves out may hold NaN, and a sequence may have nothing."""
    options = {"num_layers": 2, "bidirectional": bidirectional, "proj_size": 3, "max_length": 5}
    one = make(3, 4, batch_first=batch_first, **options)
    other = copy.deepcopy(one)
    mask = torch.rand(8, 6) < 0.6
    mask[:, 3] = False
    mask[:3, :2] = True
    x = torch.randn(8, 6, 3, dtype=torch.float64)
    hx = (
        torch.randn(2 * (1 + bidirectional), 6, 3).double(),
        torch.randn(2 * (1 + bidirectional), 6, 4).double(),
    )
    there = [k for k in range(6) if k != 3]
    sequences = [x[mask[:, k], k] for k in there]
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    expected, (h, c) = other(packed, tuple(s[:, there] for s in hx))
    expected, lengths = pad_packed_sequence(expected)

    given_x, given_mask = torch.where(mask[..., None], x, torch.nan), mask
    if batch_first:
        given_x, given_mask = given_x.transpose(0, 1), mask.T
    output, (h_n, c_n) = one(given_x, hx, given_mask)
    output = output.transpose(0, 1) if batch_first else output
    for place, k in enumerate(there):
        torch.testing.assert_close(output[mask[:, k], k], expected[: lengths[place], place])
    assert not output[~mask].any()
    torch.testing.assert_close((h_n[:, there], c_n[:, there]), (h, c))
    assert torch.equal(h_n[:, 3], hx[0][:, 3])
    assert torch.equal(c_n[:, 3], hx[1][:, 3])
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


KINDS = [
    {},
    {"bidirectional": True},
    {"num_layers": 3, "bias": False},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True},
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", KINDS)
def test_without_normalization_it_is_torchs(options):
    ours = BatchNormLSTM(3, 5, normalize=(), **options)
    theirs = nn.LSTM(3, 5, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 6, 3)
    for hx in (None, theirs(x)[1]):
        a, b = ours(x, hx), theirs(x, hx)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1][0], b[1][0])
        assert torch.equal(a[1][1], b[1][1])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("how", ["tensor", "packed"])
def test_where_every_norm_is_the_identity_it_is_torchs(options, how):
    """Mean 0, variance 1, γ = 1: outputs, states and gradients, by the steps themselves."""
    ours = BatchNormLSTM(3, 5, gamma=1.0, eps=1e-300, max_length=2, **options).double().eval()
    theirs = nn.LSTM(3, 5, **options).double()
    own = {k: v for k, v in ours.state_dict().items() if not k.startswith("norms")}
    theirs.load_state_dict(own, strict=False)
    with torch.no_grad():
        for (name, bias), norms in zip(
            ((n, p) for n, p in theirs.named_parameters() if n.startswith("bias_ih")),
            ours.norms,
            strict=False,
        ):
            norms["hidden"].bias.copy_(bias)
            getattr(theirs, name.replace("_ih", "_hh")).zero_()
    x = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 3, 1, 3] if options.get("batch_first") else [2, 4, 1, 4, 3, 4])
    results = []
    for lstm in (ours, theirs):
        given_x = x
        if how == "packed":
            batch_first = options.get("batch_first", False)
            given_x = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        y, (h, c) = lstm(given_x)
        y = y.data if how == "packed" else y
        torch.manual_seed(1)
        cotangents = [torch.randn_like(t) for t in (y, h, c)]
        wanted = [x, *(lstm.get_parameter(name) for name in own if name.startswith("weight"))]
        results.append((y, h, c, *torch.autograd.grad((y, h, c), wanted, cotangents)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("parts", [PARTS, ("input",), ("hidden",), ("cell",)])
def test_gradients(parts):
    lstm = make(2, 3, normalize=parts, max_length=2, bidirectional=True)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]]).bool()
    parameters = dict(lstm.named_parameters())

    def run(x, *values):
        with pause_statistics(lstm):
            y, (h, c) = torch.func.functional_call(
                lstm, dict(zip(parameters, values, strict=True)), (x, None, mask)
            )
        return y, h, c

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_steps_beyond_those_trained_are_evaluated_with_the_last():
    lstm = make(3, 4, max_length=10)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    for _ in range(20):
        lstm(x[:3] + 2)
    lstm.eval()
    whole, _ = lstm(x)
    short = make(3, 4, max_length=3)  # whose last step's statistics are those of all after it
    for _ in range(20):
        short(x[:3] + 2)
    short.eval()
    torch.testing.assert_close(whole, short(x)[0])
    loaded = make(3, 4, max_length=10, seed=1).eval()
    loaded.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(loaded(x)[0], whole)


def test_what_has_ended_counts_nowhere():
    """However the rest of a batch is padded, and whoever else is in it."""
    lstm = make(3, 4, max_length=6)
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([6, 5, 3, 3, 1])
    mask = torch.arange(6)[:, None] < lengths
    results = []
    for rest in (0.0, 1e30, torch.inf):
        one = copy.deepcopy(lstm)
        y, _ = one(torch.where(mask[..., None], x, rest), mask=mask)
        results.append([y, *one.buffers()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_tools_reach_the_norms_within():
    lstm = make(3, 4, max_length=4, num_layers=2)
    x = torch.randn(4, 16, 3, dtype=torch.float64)
    before = [buffer.clone() for buffer in lstm.buffers()]

    def changed():
        return any(not torch.equal(a, b) for a, b in zip(before, lstm.buffers(), strict=True))

    with pause_statistics(lstm):
        lstm(x)
    assert not changed()
    freeze(lstm)
    lstm.train()(x)
    assert not changed()
    unfreeze(lstm)
    with accumulate_statistics(lstm):
        lstm(x[:, :5])
        lstm(x[:, 5:])
        assert not changed()
    assert changed()
    # Exactly what evaluation needs: every step's, layer after layer.
    recalibrate(lstm.eval(), [x[:, :10], x[:, 10:]], method="layerwise")
    seen = {}
    for name, norm in lstm.named_modules():
        if hasattr(norm, "running_mean"):
            norm.register_forward_hook(
                lambda norm, args, _, name=name: seen.setdefault(name, []).append(args[0].detach())
            )
    lstm(x)
    for name, inputs in seen.items():
        mean, _, count = statistics(lstm.get_submodule(name), 4)
        assert (count > 0).all()
        for step, values in enumerate(inputs):
            np.testing.assert_allclose(mean[step], values.mean(0), rtol=1e-5, atol=1e-6)


# Dynamo makes an instance of Function whenever it meets an autograd function.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")
@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 4, max_length=3).train(training)
    other = copy.deepcopy(lstm)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 3)
    for _ in range(2):
        (a, (h, c)), (b, (k, d)) = lstm(x), compiled(x)
        for one, two in ((a, b), (h, k), (c, d)):
            torch.testing.assert_close(one, two)
    for one, two in zip(lstm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_dropout_is_between_layers_in_training():
    torch.manual_seed(0)
    lstm = make(3, 4, num_layers=2, dropout=1.0, max_length=4)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    with pause_statistics(lstm):
        y, _ = lstm(x)
        z, _ = lstm(x + 1)
    assert torch.equal(y, z)  # the second layer got nothing
    lstm.eval()
    assert not torch.equal(lstm(x)[0], lstm(x + 1)[0])


def test_copies_and_files():
    lstm = make(3, 4, max_length=3)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    lstm(x)
    lstm.eval()
    expected = lstm(x)[0]
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert torch.equal(other(x)[0], expected)
    assert "max_length=3, normalize=('input', 'hidden', 'cell')" in repr(lstm)
    half = lstm.half()
    assert half.norms[0]["cell"].banks["step0"].running_mean.dtype == torch.float32


def test_unbatched_is_a_batch_of_one():
    lstm = make(3, 4, max_length=3, bidirectional=True).eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    y, (h, c) = lstm(x)
    z, (k, d) = lstm(x[:, None])
    assert torch.equal(y, z[:, 0])
    assert torch.equal(h, k[:, 0])
    assert torch.equal(c, d[:, 0])
    again, _ = lstm(x, (h, c))
    assert torch.equal(again, lstm(x[:, None], (k, d))[0][:, 0])


def test_reset():
    lstm = BatchNormLSTM(3, 4, max_length=3, gamma=0.25)
    lstm(torch.randn(4, 6, 3))
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.fill_(7)
    lstm.reset_parameters()
    for norm in lstm._every_norm():
        assert (norm.weight == 0.25).all()
        assert norm.bias is None or not norm.bias.any()
        mean, var, count = statistics(norm, 3)
        assert not mean.any()
        assert (var == 1).all()
        assert not count.any()
    assert lstm.weight_hh_l0.abs().max() <= 0.5  # torch's: 1/√H


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_reversal_runs_each_sequence_from_its_end(lengths):
    lengths = sorted(lengths, reverse=True)
    sequences = [torch.arange(n) + 10 * k for k, n in enumerate(lengths)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    back = nn.utils.rnn.pack_sequence([s.flip(0) for s in sequences])
    index = _reversal(packed.batch_sizes.tolist(), torch.device("cpu"))
    assert torch.equal(packed.data[index], back.data)
    assert torch.equal(packed.data[index][index], packed.data)


# Not by what other modules draw when they are imported.
X = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: BatchNormLSTM(3, 4, max_length=0), ArgumentError, "max_length of at least 1"),
        (lambda: BatchNormLSTM(3, 4, normalize="cell"), ArgumentError, "some of 'input', 'hidden'"),
        (lambda: BatchNormLSTM(3, 4, normalize=["output"]), ArgumentError, r"got \['output'\]"),
        (lambda: BatchNormLSTM(3, 4, gamma="small"), ArgumentError, "gamma to be a number"),
        (lambda: BatchNormLSTM(3, 4, eps=0), ArgumentError, "eps > 0"),
        (lambda: BatchNormLSTM(3, 4)(X[..., :2]), InputError, r"shape \(L, N, 3\)"),
        (lambda: BatchNormLSTM(3, 4)(X[:0]), InputError, "at least one step"),
        (lambda: BatchNormLSTM(3, 4)(X[None]), InputError, r"input of shape \(L, N, channels\)"),
        (lambda: BatchNormLSTM(3, 4)(X, mask=torch.ones(4, 6)), InputError, "mask of bool"),
        (
            lambda: BatchNormLSTM(3, 4, batch_first=True)(X, mask=torch.ones(6, 4).bool()),
            InputError,
            r"of shape \(4, 6\), got torch.bool and \(6, 4\)",
        ),
        (
            lambda: BatchNormLSTM(3, 4)(X, (torch.zeros(1, 6, 4), torch.zeros(1, 5, 4))),
            InputError,
            r"\(1, 6, 4\) and \(1, 6, 4\), got \(1, 6, 4\) and \(1, 5, 4\)",
        ),
        (
            lambda: BatchNormLSTM(3, 4)(nn.utils.rnn.pack_sequence([X[0]]), mask=X[0, 0] > 0),
            InputError,
            "no mask with a PackedSequence",
        ),
        (lambda: BatchNormLSTM(3, 4)(X, X > 0), InputError, "a tensor; a mask goes by its name"),
        (
            lambda: BatchNormLSTM(3, 4)(X, (torch.zeros(1, X.shape[1], 4).double(),) * 2),
            InputError,
            r"of torch\.float32 on cpu, as x is, got torch\.float64",
        ),
        # One sequence has no statistics; the norm that says so is named.
        (lambda: BatchNormLSTM(3, 4)(X[:, :1]), InputError, r"'norms\.0\.input'.*more than 1"),
    ],
)  # fmt: skip
def test_refusals(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


def test_banks_around_it_are_refused():
    lstm = BatchNormLSTM(3, 4, max_length=2)
    with bank(lstm, "fake"), pytest.raises(ArgumentError, match=r"no bank around.*'fake'"):
        lstm(X)


def test_nothing_has_changed_when_an_error_is_raised():
    lstm = make(3, 4, max_length=4)
    before = [buffer.clone() for buffer in lstm.buffers()]
    with pytest.raises(InputError):
        lstm(X[:, :1].double())
    with pytest.raises(InputError):
        lstm(X.double(), mask=torch.ones(6, 4).bool())
    with pytest.raises(InputError):
        lstm(X.double(), (torch.zeros(1, X.shape[1], 4),) * 2)
    assert lstm._reached == 0
    assert all(torch.equal(a, b) for a, b in zip(before, lstm.buffers(), strict=True))
    for norm in lstm._every_norm():
        assert norm._bank is None
        assert norm.training


@pytest.mark.parametrize("how", ["tensor", "mask", "packed"])
def test_autocast(how):
    torch.manual_seed(0)
    lstm = BatchNormLSTM(3, 4, max_length=4, bidirectional=True, num_layers=2)
    twin = copy.deepcopy(lstm)
    # Of three sequences that go on, two may be so near that rounding turns them about.
    lengths = torch.tensor([4, 2, 3, 4, 4, 1] * 4)
    given_x = torch.randn(4, len(lengths), 3)
    mask = torch.arange(4)[:, None] < lengths if how == "mask" else None
    if how == "packed":
        given_x = pack_padded_sequence(given_x, lengths, enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h, _) = lstm(given_x, mask=mask)
    expected, (k, _) = twin(given_x, mask=mask)
    if how == "packed":
        output, expected = output.data, expected.data
    # Products of a few numbers below 2 in bfloat16 are off by 2⁻⁸ of themselves; γ is 0.1. The
    # largest difference of 150 seeds was 0.0042.
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(h.float(), k, rtol=0, atol=0.02)
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lstm.parameters())
