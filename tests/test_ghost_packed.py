"""Ghost batches of a PackedSequence: groups are of sequences, as if they had been padded."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import oracle
from batchnorm import BatchNorm, InputError

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("activation", [None, "relu", torch.nn.Softmax(-1), torch.nn.PReLU(4)])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_groups_of_a_packed_sequence_are_of_sequences(activation, channel_dim, is_sorted):
    """As if padded, masked, cut, and packed again."""
    lengths = torch.tensor([2, 6, 4, 3, 2])
    lengths = lengths.sort(descending=True).values if is_sorted else lengths
    x, residual = torch.randn(2, 5, 6, 4)
    pack = lambda t: pack_padded_sequence(  # noqa: E731
        t, lengths, batch_first=True, enforce_sorted=is_sorted
    )
    options = {"virtual_batch_size": 2, "momentum": None}
    bn = BatchNorm(4, channel_dim=channel_dim, activation=activation, **options)
    on_padded = BatchNorm(4, channel_dim=-1, **options)
    if isinstance(activation, str):
        on_padded.activation = activation
    torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
    on_padded.load_state_dict(bn.state_dict(), strict=False)
    mask = torch.arange(6) < lengths[:, None]
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    # Once with a NaN where a sequence has ended, which a pack does not hold.
    packed, skip = pack(leaves[0]), pack(residual)
    padded = torch.where(mask[..., None], leaves[1], torch.nan)
    y = bn(packed, residual=skip)
    z = pack(on_padded(padded, mask, residual))
    assert isinstance(y, PackedSequence)
    want = activation(z.data) if callable(activation) else z.data
    assert torch.equal(y.data, want)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)
    if not is_sorted:
        assert torch.equal(y.unsorted_indices, packed.unsorted_indices)
    dy = torch.randn(y.data.shape)
    grads = [
        torch.autograd.grad(out, (leaf, layer.weight), dy)
        for out, leaf, layer in ((y.data, leaves[0], bn), (want, leaves[1], on_padded))
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert torch.equal(bn.running_mean, on_padded.running_mean)
    assert torch.equal(bn.running_var, on_padded.running_var)
    assert bn.num_batches_tracked == 1
    # The running statistics are those of all rows; evaluation has no groups.
    f = oracle.forward(packed.data)
    assert (abs(oracle.wide(bn.running_var) - f.unbiased) <= 2.0**-22 * f.unbiased).all()
    plain = BatchNorm(4, activation=activation)
    plain.load_state_dict(bn.state_dict())
    assert torch.equal(bn.eval()(packed).data, plain.eval()(packed).data)


def test_packed_sequences_with_more_axes():
    lengths = torch.tensor([3, 1, 2])
    x = torch.randn(3, 3, 4, 5)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    mask = (torch.arange(3) < lengths[:, None])[..., None]
    for channel_dim, channels in ((1, 4), (-2, 4), (2, 5), (-1, 5)):
        bn = BatchNorm(channels, channel_dim=channel_dim, virtual_batch_size=2)
        axis = channel_dim + 1 if channel_dim > 0 else channel_dim
        twin = BatchNorm(channels, channel_dim=axis, virtual_batch_size=2)
        want = pack_padded_sequence(twin(x, mask), lengths, batch_first=True, enforce_sorted=False)
        assert torch.equal(bn(packed).data, want.data)
        assert torch.equal(bn.running_var, twin.running_var)


def test_packed_sequences_that_cannot_be():
    lengths = torch.tensor([1, 3])
    packed = pack_padded_sequence(
        torch.randn(2, 3, 4), lengths, batch_first=True, enforce_sorted=False
    )
    for bn, words in [
        (BatchNorm(4, virtual_batch_size=1), "1 in group 0 of 2"),
        (BatchNorm(5, virtual_batch_size=1), "expected 5 channels"),
        (BatchNorm(4, virtual_batch_size=1, channel_dim=3), "channel axis 3"),
        (BatchNorm(4, virtual_batch_size=1, channel_dim=-3), "channel axis -3"),
    ]:
        with pytest.raises(InputError, match=words):
            bn(packed)
        assert bn.num_batches_tracked == 0
        assert torch.equal(bn.running_var, torch.ones(bn.num_features))
