"""What BatchNormLSTM refuses: what the text says, and that nothing has changed; and its repr."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from batchnorm import ArgumentError, BatchNormLSTM, InputError, freeze

X = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([4, 2, 1, 3, 4, 4])


def make(**options):
    return BatchNormLSTM(3, 5, max_length=4, **options)


CALLS = {
    "channels before time": (
        {}, lambda lstm: lstm(X.transpose(1, 2)),
        "expected input of shape (L, N, 3), for input_size=3 and batch_first=False, got (4, 3, 6); "
        "axis 1 has 3: if those are the channels, they go last by x.transpose(1, 2)",
    ),
    "batch_first, channels first": (
        {"batch_first": True}, lambda lstm: lstm(X.permute(2, 1, 0)),
        "(N, L, 3), for input_size=3 and batch_first=True, got (3, 6, 4); axis 0 has 3",
    ),
    "other channels": (
        {}, lambda lstm: lstm(X[..., :2]), "for 2 channels, make it with input_size=2"
    ),
    "one sequence": (
        {}, lambda lstm: lstm(X[0].T),
        "shape (L, 3), for input_size=3, got (3, 6); axis 0 has 3",
    ),
    "packed": (
        {}, lambda lstm: lstm(pack_sequence([X[0, :, :2]])),
        "expected a PackedSequence of sequences (length, 3), for input_size=3, got data of shape "
        "(6, 2)",
    ),
    "four axes": ({}, lambda lstm: lstm(X[None]), "and no mask, got (1, 4, 6, 3)"),
    "a list": ({}, lambda lstm: lstm([[1.0]]), "expected a tensor or a PackedSequence, got list"),
    "integers": ({}, lambda lstm: lstm(X.long()), "got torch.int64; convert it first"),
    "packed integers": ({}, lambda lstm: lstm(pack_sequence([X[0].long()])), "got torch.int64"),
    "no sequence": (
        {}, lambda lstm: lstm(X[:, :0]), "one step and one sequence, got input of shape (4, 0, 3)"
    ),
    "float mask": (
        {}, lambda lstm: lstm(X, mask=torch.ones(4, 6)),
        "expected a mask of bool and of shape (4, 6), got torch.float32 and (4, 6). mask.bool()",
    ),
    "list as mask": (
        {}, lambda lstm: lstm(X, mask=[True]), "expected mask to be a tensor, got list"
    ),
    "mask the other way round": (
        {}, lambda lstm: lstm(X, mask=torch.ones(6, 4).bool()),
        "The other way round it fits: is batch_first=False right? Else mask.T",
    ),
    "mask of another shape": (
        {}, lambda lstm: lstm(X, mask=torch.ones(4, 6, 1).bool()), "got torch.bool and (4, 6, 1)"
    ),
    "mask of one sequence": (
        {}, lambda lstm: lstm(X[0], mask=torch.ones(6).bool()), "and no mask, got (6, 3)"
    ),
    "positional mask": (
        {}, lambda lstm: lstm(X, X[..., 0] > 0),
        "expected (h_0, c_0), got a tensor; a mask goes by its name: mask=mask",
    ),
    "positional mask, nothing normalised": (
        {"normalize": ()}, lambda lstm: lstm(X, X[..., 0] > 0), "a mask goes by its name: mask=mask"
    ),
    "three states": ({}, lambda lstm: lstm(X, (X, X, X)), "got 3 things"),
    "states of numbers": (
        {}, lambda lstm: lstm(X, (0, 0)), "tensors (h_0, c_0), got int and int"
    ),
    "states of one sequence": (
        {}, lambda lstm: lstm(X[0], (torch.zeros(2, 5), torch.zeros(2, 1, 5))),
        "shapes (2, 5) and (2, 5), got (2, 5) and (2, 1, 5)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "run", "text"), CALLS.values(), ids=CALLS)
def test_refused_calls(options, run, text):
    lstm = make(num_layers=2, **options)
    before = {key: value.clone() for key, value in lstm.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(text)):
        run(lstm)
    after = lstm.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert lstm._reached == 0


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_told_to_become_a_mask(batch_first):
    lstm = make(batch_first=batch_first).eval()
    x = X.transpose(0, 1) if batch_first else X
    with pytest.raises(InputError, match="If these are lengths") as caught:
        lstm(x, mask=LENGTHS)
    # What the text says is the mask.
    said = str(caught.value).rpartition(": ")[2]
    mask = eval(said, {"torch": torch, "lengths": LENGTHS})
    whole = [X[:n, k] for k, n in enumerate(LENGTHS)]
    expected = lstm(pack_sequence(whole, enforce_sorted=False))[1][0]
    torch.testing.assert_close(lstm(x, mask=mask)[1][0], expected)


@pytest.mark.parametrize("normalize", [None, 3, "cell", ["output"], [None], [["cell"]], X])
def test_refused_names(normalize):
    text = "some of 'input', 'hidden', 'cell', such as ('input',), or () for none, got "
    with pytest.raises(ArgumentError, match=re.escape(text)):
        make(normalize=normalize)


def within(lstm):
    return nn.Sequential(lstm, nn.Linear(5, 2))


def test_torchs_state_dict_is_refused_shortly():
    theirs, lstm = nn.LSTM(3, 5).state_dict(), BatchNormLSTM(3, 5)
    before = {key: value.clone() for key, value in lstm.state_dict().items()}
    with pytest.raises(InputError, match=r"They look like nn\.LSTM's") as caught:
        lstm.load_state_dict(theirs)
    text = str(caught.value)
    assert len(text) < 500
    assert "905 keys of what normalises, norms.0.input.weight and so on" in text
    assert "got weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0." in text
    after = lstm.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("where", [lambda lstm: lstm, within])
def test_what_need_not_fit_is_loaded_as_torch_does(where):
    """As the text advises: the weights, and nothing else of this layer."""
    torchs = nn.LSTM(3, 5)
    lstm = make()
    lstm(X)
    before = {key: value.clone() for key, value in lstm.state_dict().items()}
    result = where(lstm).load_state_dict(where(torchs).state_dict(), strict=False)
    prefix = "0." if where is within else ""
    assert result.unexpected_keys == [prefix + "bias_ih_l0", prefix + "bias_hh_l0"]
    assert f"{prefix}norms.0.cell.banks.step2.running_var" in result.missing_keys
    for key, value in lstm.state_dict().items():
        expected = before[key] if key.startswith("norms.") else torchs.state_dict()[key]
        assert torch.equal(value, expected)
    assert lstm._reached == 4  # as the statistics are: of this layer's own batches
    plain = BatchNormLSTM(3, 5, normalize=())
    where(plain).load_state_dict(where(torchs).state_dict())
    assert torch.equal(plain(X)[0], torchs(X)[0])


def test_a_state_dict_of_elsewhere_is_refused_shortly():
    lstm = BatchNormLSTM(3, 5)
    wrapped = {f"module.{key}": value for key, value in lstm.state_dict().items()}
    with pytest.raises(InputError, match=r"got module\.weight_ih_l0, .* and \d+ more$"):
        lstm.load_state_dict(wrapped)
    with pytest.raises(InputError, match=r"got no key$"):
        lstm.load_state_dict({})


@pytest.mark.parametrize(("kept", "here"), [(5, 4), (2, 4), (1, 4), (4, 1)])
def test_a_state_dict_of_other_steps_is_refused(kept, here):
    """The last step's statistics would serve an earlier one."""
    file = BatchNormLSTM(3, 5, max_length=kept).state_dict()
    text = rf"of {here} steps, for max_length={here}, got those of {kept}; make it with max_"
    for strict in (True, False):
        with pytest.raises(InputError, match=text):
            BatchNormLSTM(3, 5, max_length=here).load_state_dict(file, strict=strict)
    model = within(BatchNormLSTM(3, 5, max_length=here))
    theirs = within(BatchNormLSTM(3, 5, max_length=kept)).state_dict()
    before = list(model[0].state_dict())
    for strict in (True, False):
        with pytest.raises(InputError, match=text):
            model.load_state_dict(theirs, strict=strict)
    assert list(model[0].state_dict()) == before
    BatchNormLSTM(3, 5, max_length=kept).load_state_dict(file)


@pytest.mark.parametrize("where", [lambda lstm: lstm, within])
def test_what_is_only_part_of_a_state_dict_is_loaded_as_torch_does(where):
    """Parameters alone, or γ of one layer, say nothing of steps."""
    twin, lstm = (BatchNormLSTM(3, 5, max_length=4) for _ in range(2))
    twin(X)
    parameters = dict(where(twin).named_parameters())
    where(lstm).load_state_dict(parameters, strict=False)
    for key, value in lstm.named_parameters():
        assert torch.equal(value, twin.get_parameter(key))
    assert lstm._reached == 0
    gamma = {"norms.0.cell.weight": torch.full((5,), 3.0)}
    lstm.load_state_dict(gamma, strict=False)
    assert torch.equal(lstm.norms[0]["cell"].weight, gamma["norms.0.cell.weight"])
    plain = BatchNormLSTM(3, 5, normalize=())
    plain.load_state_dict(twin.state_dict(), strict=False)
    assert torch.equal(plain.weight_hh_l0, twin.weight_hh_l0)


def test_a_converted_layer_is_refused_and_can_be_printed():
    lstm = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    assert repr(lstm).startswith("BatchNormLSTM(3, 5, max_length=4")
    with pytest.raises(ArgumentError, match="got SyncBatchNorm; leave it out when converting"):
        lstm(X)


ALL = "normalize=('input', 'hidden', 'cell')"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, f"10, 20, max_length=100, {ALL}, gamma=0.1"),
        (
            {"num_layers": 2, "batch_first": True, "bidirectional": True, "max_length": 784},
            f"10, 20, num_layers=2, batch_first=True, bidirectional=True, max_length=784, {ALL}, "
            "gamma=0.1",
        ),
        ({"bias": False, "gamma": 1}, f"10, 20, bias=False, max_length=100, {ALL}, gamma=1.0"),
        (
            {"normalize": ["cell"], "eps": 1e-3, "momentum": None},
            "10, 20, max_length=100, normalize=('cell',), gamma=0.1, eps=0.001, momentum=None",
        ),
        ({"normalize": ["cell"], "bias": False, "momentum": 1},
         "10, 20, bias=False, max_length=100, normalize=('cell',), gamma=0.1, momentum=1"),
        ({"normalize": (), "bias": False}, "10, 20, bias=False, normalize=()"),
    ],
)  # fmt: skip
def test_repr_is_a_line(options, text):
    assert repr(BatchNormLSTM(10, 20, **options)) == f"BatchNormLSTM({text})"


def test_repr_of_what_has_been_changed_since():
    lstm = BatchNormLSTM(3, 5)
    freeze(lstm.norms[0]["cell"])
    lstm.norms[0]["cell"].momentum = 0.5
    assert repr(lstm).endswith("gamma=0.1, momentum=various, 1 of 3 frozen)")
    freeze(lstm)
    assert repr(nn.Sequential(lstm)).endswith(", momentum=various, frozen)\n)")
