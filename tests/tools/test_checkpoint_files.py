"""Files: what is found wherever it lies, nothing is run, and what is no checkpoint says so."""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchnorm import ArgumentError, BatchNorm, BatchNormError, InputError, inspect_checkpoint

ZIP = pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(4, 8), BatchNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    for _ in range(40):
        model(torch.randn(16, 4))
    return model


def save(content, path, archive=True):
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


def names(diagnosis):
    return [layer.name for layer in diagnosis.layers]


@ZIP
def test_layers_are_found_however_deep(model, tmp_path, archive):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    weights = model.state_dict()
    beside = {"optimizer": [optimizer.state_dict()], "epoch": 3, "lrs": [0.1, 0.2], "best": None}
    own = ["1", "3"]
    for content, expected in (
        (weights, own),
        ({"state_dict": weights, **beside}, own),
        ({"model": weights, **beside, "rng": torch.get_rng_state()}, own),
        ({"a": {"b": [{"state": weights}]}}, own),
        ({"model": weights, "ema": dict(weights)}, ["model.1", "model.3", "ema.1", "ema.3"]),
        ({"model": weights, "best": weights}, own),  # one object: once
        ([{"g": weights}, {"d": dict(weights)}], ["0.g.1", "0.g.3", "1.d.1", "1.d.3"]),
        ({f"module.{k}": v for k, v in weights.items()}, ["module.1", "module.3"]),
        (model[1].state_dict(), [""]),
        ({"encoder": {"norm": dict(model[1].state_dict())}}, [""]),
    ):
        found = inspect_checkpoint(save(content, tmp_path / "file", archive))
        assert names(found) == expected
        assert not found.findings
        assert [layer.updates for layer in found.layers] == [41] * len(expected)
        assert {layer.channels for layer in found.layers} == {8}


def test_the_outlines_names_and_a_filter_that_is_no_gamma(tmp_path):
    """γ is told from the number of its values: that of 3 is zero in one of 4 channels."""
    statistics = {"running_mean": torch.randn(4), "running_var": torch.rand(4) + 1}
    gamma = torch.tensor([1.0, 0, 1, 1])
    for affine, dead in (
        ({"gamma": gamma, "beta": torch.zeros(4)}, True),
        ({"weight": gamma}, True),
        ({"weight": torch.zeros(4, 3, 1, 1), "gamma": gamma}, True),
        ({"weight": torch.zeros(4, 3, 1, 1)}, False),
    ):
        content = {f"bn.{k}": v for k, v in (statistics | affine).items()}
        found = inspect_checkpoint(save(content, tmp_path / "file"))
        assert [f.code for f in found.findings] == ["BN304"] * dead


def test_statistics_of_any_shape(tmp_path):
    shape = (1, 8, 1, 1)
    content = {"a.running_mean": torch.randn(shape), "a.running_var": torch.rand(shape) + 1}
    found = inspect_checkpoint(save(content, tmp_path / "file"))
    assert (found.layers[0].channels, found.findings) == (8, ())


def test_without_layers_there_is_a_note(tmp_path):
    found = inspect_checkpoint(save(nn.Linear(2, 2).state_dict(), tmp_path / "file"))
    assert (found.findings, found.layers) == ((), ())
    assert "No batch norm layers" in found.notes[0]


def test_tensors_that_are_no_numbers_are_noted(tmp_path):
    vast = torch.zeros(1).expand(1 << 40)  # few bytes that claim to be many
    for mean in (torch.ones(4, dtype=torch.int), torch.ones(4).to_sparse(), vast):
        content = {"a.running_mean": mean, "a.running_var": torch.ones(4)}
        found = inspect_checkpoint(save(content, tmp_path / "file"))
        assert not found.layers
        assert found.notes[0].startswith("a: ")


def test_a_file_that_nests_without_end_is_no_trap(model):
    """Too deep for pickle to write, but a hostile file may have it; and circles."""
    from batchnorm.tools.checkpoint.kept import _state_dicts

    content = circle = [model.state_dict()]
    for _ in range(100_000):
        content = [content]
    circle.append(circle)
    assert list(_state_dicts(content)) == []
    assert [place for place, _ in _state_dicts(circle)] == ["0"]
    while content is not circle:  # or freeing it all at once would be the trap
        (content,) = content
    circle.clear()


def test_settings_beside_the_weights_are_passed_over(model, tmp_path):
    content = {
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")),
        "best": np.float64(3),
        "history": np.arange(3),
        "counts": collections.Counter("aab"),
    }
    assert names(inspect_checkpoint(save(content, tmp_path / "file"))) == ["1", "3"]


class Payload:
    """What a hostile file would have Python do."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@ZIP
@pytest.mark.parametrize("place", ["alone", "beside", "key"])
def test_no_code_of_a_file_is_run(model, tmp_path, archive, place):
    marker = tmp_path / "ran"
    for function, argument in (
        (os.system, f"touch {marker}"),
        (exec, f"import pathlib; pathlib.Path({str(marker)!r}).touch()"),
        (pathlib.Path.touch, marker),
    ):
        evil = Payload(function, argument)
        pickle.loads(pickle.dumps(evil))  # that it would
        assert marker.exists()
        marker.unlink()
        content = {
            "alone": evil,
            "beside": {"state_dict": model.state_dict(), "x": evil},
            "key": {"state_dict": {**model.state_dict(), "1.running_mean": evil}},
        }[place]
        path = save(content, tmp_path / "file", archive)
        with pytest.raises(InputError, match="objects of other classes"):
            inspect_checkpoint(path)
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"a pickle that torch\.save did not write"):
            inspect_checkpoint(path)
        assert not marker.exists()


@ZIP
def test_a_whole_model_says_how_to_save_a_state_dict(model, tmp_path, archive):
    path = save(model, tmp_path / "model.pt", archive)
    with pytest.raises(InputError, match=r"torch\.save\(model\.state_dict\(\), …\)"):
        inspect_checkpoint(path)


def test_safetensors_and_nothing_else_of_it_is_read(model, tmp_path, monkeypatch):
    import safetensors

    # Whatever it is called.
    path = tmp_path / "pytorch_model.bin"
    save_file({**model.state_dict(), "huge": torch.zeros(1000)}, path)
    read = []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.open.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.open.get_tensor(key)

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    found = inspect_checkpoint(path)
    assert sorted(names(found)) == ["1", "3"]
    assert {key.partition(".")[0] for key in read} == {"1", "3"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_in_parts(model, tmp_path, kind):
    """One layer's mean in one part, its variance in the other."""
    weights = model.state_dict()
    parts = [dict(list(weights.items())[:5]), dict(list(weights.items())[5:])]
    assert "1.running_mean" in parts[0]
    assert "1.running_var" in parts[1]
    index = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, tmp_path / name)
        index |= dict.fromkeys(part, name)
    path = tmp_path / f"model.{kind}.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    found = inspect_checkpoint(path)
    assert sorted(names(found)) == ["1", "3"]
    assert not found.findings
    (tmp_path / "model-1").with_suffix(f".{kind}").unlink()
    with pytest.raises(ArgumentError, match="no such file"):
        inspect_checkpoint(path)
    for wrong in ("[]", "{", '{"weight_map": {"a.running_mean": "../other.bin"}}'):
        path.write_text(wrong)
        with pytest.raises(InputError, match="an index of a sharded checkpoint"):
            inspect_checkpoint(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_at_any_place(model, tmp_path, kind):
    path = tmp_path / "file"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        save(model.state_dict(), path, kind == "zip")
    whole = path.read_bytes()
    for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError):
            inspect_checkpoint(path)


def test_any_byte_changed_is_an_error_or_a_diagnosis(model, tmp_path):
    """Never another exception."""
    generator = np.random.default_rng(0)
    for archive in (True, False):
        path = save({"state_dict": model.state_dict()}, tmp_path / "file", archive)
        whole = bytearray(path.read_bytes())
        for place in generator.integers(0, len(whole), 150):
            changed = whole.copy()
            changed[place] ^= 1 << generator.integers(0, 8)
            path.write_bytes(changed)
            with contextlib.suppress(BatchNormError):
                inspect_checkpoint(path)


OTHERS = {
    b"": "an empty file",
    b"hello world": "begins with b'hello world'",
    bytes(range(200, 256)): "a file that begins with",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a": "git lfs pull",
    b"<!DOCTYPE html><html>": "a web page",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b'{"weights": 1}': "JSON",
}


def test_what_is_no_checkpoint_says_what_it_is(tmp_path):
    path = tmp_path / "file"
    for content, message in OTHERS.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            inspect_checkpoint(path)
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    with pytest.raises(InputError, match="another zip archive"):
        inspect_checkpoint(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "script", "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(InputError, match=r"torch\.jit\.load"):
        inspect_checkpoint(tmp_path / "script")
    (tmp_path / "x.safetensors").write_bytes(b"hello world")
    with pytest.raises(InputError, match="damaged or cut off"):
        inspect_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="a file with one Tensor"):
        inspect_checkpoint(save(torch.ones(3), path))
    torch.save({"a": torch.ones(3)}, path, pickle_protocol=4)
    with pytest.raises(InputError, match="pickle protocol 2"):
        inspect_checkpoint(path)


def test_paths_that_cannot_be(model, tmp_path):
    with pytest.raises(ArgumentError, match="no such file"):
        inspect_checkpoint(tmp_path / "nope.pt")
    save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ArgumentError, match=r"a directory: .*; there is model\.pt in it"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(ArgumentError, match="got OrderedDict; for a model in memory"):
        inspect_checkpoint(model.state_dict())


def test_loading_leaves_torchs_list_of_safe_globals(model, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    inspect_checkpoint(save(model.state_dict(), tmp_path / "file"))
    assert set(torch.serialization.get_safe_globals()) == before


def test_an_archive_that_another_tool_has_compressed(model, tmp_path):
    """Mapped into memory, its tensors would be noise."""
    save(model.state_dict(), tmp_path / "model.pt")
    with (
        zipfile.ZipFile(tmp_path / "model.pt") as plain,
        zipfile.ZipFile(tmp_path / "less.pt", "w", zipfile.ZIP_DEFLATED) as less,
    ):
        for name in plain.namelist():
            less.writestr(name, plain.read(name))
    expected = inspect_checkpoint(tmp_path / "model.pt")
    assert inspect_checkpoint(tmp_path / "less.pt") == expected
    assert expected.findings == ()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits(model, tmp_path, kind, dtype):
    model[1].running_var[2] = -1
    weights = {
        k: t.to(dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()
    }
    path = tmp_path / f"model.{kind}"
    save_file(weights, path) if kind == "safetensors" else torch.save(weights, path)
    diagnosis = inspect_checkpoint(path)
    assert names(diagnosis) == ["1", "3"]
    assert ("BN104", "1") in [(f.code, f.layer) for f in diagnosis.findings]
