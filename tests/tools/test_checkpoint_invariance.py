"""What is found does not depend on where and in what order things lie."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import inspect_checkpoint

#: What a channel may have, one fault each or none: mean, variance, γ.
FAULTS = {
    "none": (0.3, 1.7, 0.9),
    "nan": (math.nan, 1.7, 0.9),
    "infinite": (0.3, math.inf, 0.9),
    "negative": (0.3, -0.1, 0.9),
    "no variance": (0.3, 0.0, 0.9),
    "dead": (0.3, 1.7, 0.0),
    "far": (-1e7, 1.7, 0.9),
    "small": (0.0, 1e-7, 0.9),
}
channels = st.lists(st.sampled_from(list(FAULTS)), min_size=3, max_size=24)
layers = st.lists(st.tuples(channels, st.integers(0, 60)), min_size=1, max_size=3)
places = st.lists(st.sampled_from(["model", "state_dict", "0", "net"]), max_size=3)


def state(parts, orders):
    """A state dict; each layer's channels in an order of its own."""
    tensors = {}
    for number, ((faults, updates), order) in enumerate(zip(parts, orders, strict=True)):
        mean, var, gamma = torch.tensor([FAULTS[faults[place]] for place in order]).T
        for name, value in (("running_mean", mean), ("running_var", var), ("weight", gamma)):
            tensors[f"l{number}.{name}"] = value.clone()
        tensors[f"l{number}.num_batches_tracked"] = torch.tensor(updates)
    return tensors


def found(tensors, path):
    torch.save(tensors, path)
    diagnosis = inspect_checkpoint(path)
    return sorted(
        (f.code, f.severity, f.layer, f.evidence.get("number")) for f in diagnosis.findings
    )


@given(layers, places, st.randoms(use_true_random=False))
def test_order_of_channels_and_of_layers_and_depth(tmp_path_factory, parts, path, random):
    file = tmp_path_factory.mktemp("invariance", numbered=True) / "file"
    orders = [list(range(len(faults))) for faults, _ in parts]
    expected = found(state(parts, orders), file)
    for order in orders:
        random.shuffle(order)
    tensors = list(state(parts, orders).items())
    random.shuffle(tensors)
    content = dict(tensors)
    for place in path:
        content = {place: content, "epoch": 3}
    assert found(content, file) == expected
    # And each fault that was put there has its code.
    codes = {(code, layer) for code, _, layer, _ in expected}
    for number, (faults, _) in enumerate(parts):
        for fault, code in (
            ("nan", "BN103"),
            ("infinite", "BN103"),
            ("negative", "BN104"),
            ("no variance", "BN104"),
            ("dead", "BN304"),
            ("far", "BN307"),
        ):
            if fault in faults:
                assert (code, f"l{number}") in codes
