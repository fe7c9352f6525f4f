"""Values at every edge of a tile, however a tensor is cut, and however it lies."""

import pytest
import torch

from triton_steps import CUTS, DEVICE, LAYOUTS, PATHS, check, counts, lay, normal

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

each_cut = pytest.mark.parametrize("cut", CUTS, indirect=True)
each_path = pytest.mark.parametrize("cut", PATHS, indirect=True)


@each_cut
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [
        ((2, 1), 1),
        ((7, 3), 1),  # ragged along each axis
        ((32, 4), 1),  # along none
        ((33, 9), 1),  # one more than that
        ((5, 40), 1),  # few rows, many channels
        ((3, 2, 11), 1),
        ((2, 3, 4, 4), 1),  # runs of 16, which loads can be as long as
        ((1, 2, 33), 1),
        ((1, 1, 130), 1),
        ((9, 2, 3), 1),  # runs shorter than a sector
        ((3, 4, 2), -1),
        ((5, 3, 3), 0),
        ((2, 2, 3, 2, 2), 2),
    ],
    ids=str,
)
def test_shapes(cut, shape, channel_dim):
    x = normal(*shape) * 2 + 5
    mask = counts(shape, channel_dim)
    check(x, channel_dim=channel_dim, activation="relu")
    check(x, channel_dim=channel_dim, mask=mask, residual=normal(*shape), activation="leaky_relu")


@each_path
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 3, 2)], ids=str)
def test_layouts(cut, layout, shape):
    """Of x, its gradient and the residual, which need not lie as x does."""
    x = lay(normal(*shape) + 1, layout)
    others = LAYOUTS * 2
    for k in range(3):
        residual, dy = (lay(normal(*shape), others[others.index(layout) + k + n]) for n in (0, 1))
        check(x, residual=residual, dy=dy, activation="relu", mask=counts(shape) if k else None)


@each_path
@pytest.mark.parametrize(
    ("dtype", "skip", "parameters"),
    [
        (F16, F16, F32),
        (F16, F32, F16),
        (F32, F16, F64),
        (BF16, None, BF16),
        (BF16, BF16, F32),
        (BF16, F32, F64),
        (F16, BF16, F32),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dtypes(cut, dtype, skip, parameters, layout):
    x = lay(normal(4, 3, 9, dtype=dtype) + 3, layout)
    residual = None if skip is None else lay(normal(4, 3, 9, dtype=skip), layout)
    for activation in (None, "relu", "leaky_relu"):
        check(x, residual=residual, activation=activation, parameters=parameters)


@each_path
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("extras", ["", "mask", "residual", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_fused(cut, activation, extras, training):
    shape = (3, 2, 11)
    mask = counts(shape) if extras in ("mask", "both") else None
    residual = normal(*shape) if extras in ("residual", "both") else None
    check(normal(*shape), mask=mask, residual=residual, activation=activation, training=training)


@each_path
@pytest.mark.parametrize("kind", [torch.bool, F32, F64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masks(cut, kind, layout):
    shape = (3, 2, 2, 6)
    x = lay(normal(*shape) + 2, layout)
    check(x, mask=counts(shape, kind=kind))
    # Of the shape of x but for axes that it is broadcast along, and dense in another order.
    check(x, mask=counts(shape, kind=kind)[:, :1])
    check(x, mask=counts(shape, kind=kind)[:1], activation="relu")
    check(x, mask=counts(shape, kind=kind).transpose(1, 2).contiguous().transpose(1, 2))
    check(x, mask=counts(shape, kind=kind)[:1, :1].expand(3, 2, 6))


@each_path
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_that_are_not_there(cut, affine, training):
    for activation in (None, "relu"):
        check(normal(5, 3, 4), affine=affine, training=training, activation=activation)


@each_path
@pytest.mark.parametrize("kept", [F32, F64, F16, BF16])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(cut, kept, momentum):
    check(normal(9, 5) * 3 + 1, kept=kept, momentum=momentum)
    check(normal(9, 5), kept=kept, training=False)


@each_path
@pytest.mark.parametrize("offset", [1e3, 1e4, -1e5, 1e6])
@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 15)], ids=str)
def test_far_from_zero(cut, offset, shape):
    """As good as near it: what float32 cannot hold of x is lost before it comes here."""
    x = normal(*shape) + offset
    check(x, activation="relu")
    check(x, mask=counts(shape), residual=normal(*shape))
    check(x.double().to(F32) * 1.0, eps=1e-3, kept=F64)


@each_path
@pytest.mark.parametrize("first", [1, 5, 17])
def test_a_mask_that_begins_late(cut, first):
    """Tiles without an element that counts come before the first one that has any."""
    x = normal(20, 3) + 1e4
    mask = torch.arange(20, device=DEVICE) >= first
    check(x, mask=mask)
    check(x, mask=mask.flip(0))
    check(x.reshape(2, 3, 10).contiguous(), mask=mask.reshape(2, 10))
    mask[:] = False
    mask[first : first + 2] = True
    check(x, mask=mask)


HOSTILE = {
    "first far": lambda x: x.index_fill(0, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1e5),
    "last far": lambda x: x.index_fill(0, torch.full((1,), len(x) - 1, device=DEVICE), -1e5),
    "sorted": lambda x: x.sort(0)[0] * 100,
    "two heaps": lambda x: torch.where(
        torch.arange(x.numel(), device=DEVICE).view_as(x) < 60, 0.1, 1e4
    ),
    "constant": lambda x: torch.full_like(x, 3.7),
    "constant and far": lambda x: torch.full_like(x, 16777215.0),
    "large": lambda x: x * 1e17,
    "huge": lambda x: x * 1e37,
    "huge and far": lambda x: x * 1e30 + 1e36,
    "small": lambda x: x * 1e-17,
    "denormal": lambda x: x * 1e-40,
    "alternating": lambda x: x + 1e6 * (-1.0) ** torch.arange(len(x), device=DEVICE)[:, None],
}


@each_path
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data(cut, kind):
    """What cancels in m2 is at most the number of tiles in a program times it: 3 here."""
    x = HOSTILE[kind](normal(40, 3)).float()
    kept = F64 if kind in ("large", "huge", "huge and far", "small", "denormal") else F32
    check(x, hostile=4, kept=kept)
    check(x.T.reshape(1, 3, 40).contiguous(), hostile=4, kept=kept, mask=counts((1, 3, 40)))


@each_path
def test_numbers_of_half_precision_to_their_ends(cut):
    numbers = torch.tensor([65504.0, -65504.0, 6e-8, 0.0, 1.0], device=DEVICE).half()
    x = numbers.repeat(6, 1)
    check(x, kept=F64)
    x = numbers.repeat(6).view(10, 3)
    check(x, kept=F64)
    check((x.float() * 1e-3).bfloat16(), kept=F64)


def test_tensors_of_the_sizes_that_constants_are_for():
    """Without a smaller cut: several tiles and programs of the usual size."""
    check(normal(9000, 3) + 100, activation="relu")
    check(normal(3, 2, 4100, dtype=F16), mask=counts((3, 2, 4100)))
    check(lay(normal(40, 20, 16, 16, dtype=BF16), "channels_last"), residual=None)
