"""Folders of IDX and CIFAR files, small ones in the real formats."""

import gzip
import struct

import numpy as np
import pytest

from batchnorm.errors import InputError
from batchnorm.lab.data import load

RNG = np.random.default_rng(0)


def idx(values):
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


def mnist(folder, suffix="", test="t10k"):
    """Writes 120 training and 30 test images of 6 × 5, and returns them."""
    parts = {}
    for part, number in (("train", 120), (test, 30)):
        images = RNG.integers(0, 256, (number, 6, 5))
        labels = np.arange(number) % 3 + 4
        for what, values in (("images", images), ("labels", labels)):
            content = idx(values)
            name = f"{part}-{what}-idx{values.ndim}-ubyte{suffix}"
            (folder / name).write_bytes(gzip.compress(content) if suffix else content)
        parts[part] = images, labels
    return (*parts["train"], *parts[test])


def check(data, x, y, x_test, y_test):
    """The division is kept; one mean and one standard deviation, of the training images."""
    for ours, theirs in ((data.x_train, x), (data.x_test, x_test)):
        np.testing.assert_allclose(ours, (theirs - x.mean()) / x.std(), rtol=1e-5, atol=1e-6)
    labels = np.unique(y)
    assert (labels[data.y_train] == y).all()
    assert (labels[data.y_test] == y_test).all()
    assert data.classes == len(labels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("test", ["t10k", "test"])
def test_idx(tmp_path, suffix, test):
    parts = mnist(tmp_path, suffix, test)
    data = load(str(tmp_path))
    check(data, *parts)
    assert data.name == tmp_path.name
    assert data.describe()["row_shape"] == [6, 5]


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar(tmp_path, labels):
    """Of 100 classes each row has a coarse label before the fine one, which counts."""
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] if labels == 1 else ["train.bin"]
    last = "test_batch.bin" if labels == 1 else "test.bin"
    written = []
    for name in [*names, last]:
        images = RNG.integers(0, 256, (24 if labels == 1 else 120, 3, 32, 32))
        fine = np.arange(len(images)) % 5
        rows = [np.full((len(images), 1), 9)] * (labels - 1) + [fine[:, None]]
        rows.append(images.reshape(len(images), -1))
        (tmp_path / name).write_bytes(np.concatenate(rows, 1).astype(np.uint8).tobytes())
        written.append((images, fine))
    x = np.concatenate([images for images, _ in written[:-1]])
    y = np.concatenate([fine for _, fine in written[:-1]])
    check(load(str(tmp_path)), x, y, *written[-1])


def damage(folder, name, change):
    mnist(folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))


LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "IDX files of MNIST.*there is no file"),
        (lambda folder: (folder / "readme.txt").touch(), "there is readme.txt"),
        (lambda folder: damage(folder, LABELS, lambda b: b[:-1]), "119 values, not the 120"),
        (lambda folder: damage(folder, LABELS, lambda b: b[:6]), "it ends in its head"),
        (lambda folder: damage(folder, LABELS, lambda b: b"PK" + b), "it begins otherwise"),
        (lambda folder: damage(folder, LABELS, lambda b: b"\0\0\x0d" + b[3:]), "type 0x0d"),
        (
            lambda folder: damage(folder, LABELS, lambda _: idx(np.zeros(7))),
            r"as many train labels as images, got .*\(120, 6, 5\) and labels of shape \(7,\)",
        ),
        (
            lambda folder: (mnist(folder), (folder / LABELS).unlink()),
            "there is no train-labels-idx1-ubyte",
        ),
        (
            lambda folder: (
                mnist(folder, ".gz"),
                (folder / f"{LABELS}.gz").write_bytes(gzip.compress(b"1" * 99)[:-9]),
            ),
            "expected a whole file",
        ),
        (
            lambda folder: (
                (folder / "train.bin").write_bytes(b"1" * 3074),
                (folder / "test.bin").write_bytes(b"1" * 100),
            ),
            "rows of 3074 bytes; got 100 bytes",
        ),
        (lambda folder: (folder / "train.bin").write_bytes(b"1" * 3074), "there is no test.bin"),
    ],
)  # fmt: skip
def test_what_is_no_such_folder_is_told(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))
