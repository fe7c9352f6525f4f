import pickle
import zipfile

import numpy as np
import pytest

from batchnorm.errors import InputError
from batchnorm.lab.data import load


def rows(n=120, classes=3, features=5):
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (n, features)), np.arange(n) % classes


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return str(path)

    return write


def test_digits_are_split_stratified_and_scaled():
    data = load("digits")
    assert data.x_train.shape == (1294, 8, 8)
    assert data.x_test.shape == (503, 8, 8)
    assert data.classes == 10
    assert data.x_train.mean() == pytest.approx(0, abs=1e-6)
    assert data.x_train.std() == pytest.approx(1, abs=1e-6)
    shares = np.bincount(data.y_test) / np.bincount(np.concatenate([data.y_train, data.y_test]))
    assert shares == pytest.approx(np.full(10, 0.28), abs=0.005)
    # One scale for all pixels: the always dark corner stays a constant, and is not blown up.
    assert np.ptp(data.x_train[:, 0, 0]) == 0
    # Finished runs are filed under it.
    assert data.fingerprint == "3b3cf0f27920919a78338a8dd5a7e76dbbab8ecd10e016e182800697f1e2e6a1"


def test_file_keeps_every_row_once_and_renumbers_the_classes(save):
    x, y = rows()
    labels = np.array([7, -2, 40])[y]
    data = load(save(x=x, y=labels))
    assert data.name == "data.npz"
    assert data.classes == 3
    both = np.concatenate([data.x_train, data.x_test])
    classes = np.concatenate([data.y_train, data.y_test])
    # Each column was shifted and scaled by itself, which sorted values undo.
    lines = [np.polyfit(np.sort(a), np.sort(b), 1) for a, b in zip(both.T, x.T, strict=True)]
    scale, centre = np.array(lines).T
    order = np.lexsort((both * scale + centre).T.round(4))
    expected = np.lexsort(x.T.round(4))
    assert (both * scale + centre)[order] == pytest.approx(x[expected], abs=1e-4)
    assert (np.array([-2, 7, 40])[classes][order] == labels[expected]).all()


def test_columns_of_a_table_are_scaled_one_by_one_and_images_as_a_whole(save):
    x, y = rows(features=4)
    x *= [1, 1000, 1e-3, 0]
    # Of a constant 0.1, rounding can leave a mean and a deviation that are not exact.
    x[:, 3] = 0.1
    table = load(save(x=x, y=y))
    assert table.x_train.mean(0) == pytest.approx(np.zeros(4), abs=1e-6)
    assert table.x_train.std(0) == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert "Each column" in table.scaling
    assert "1 column that never changed there" in table.describe()["scaling"]
    images = load(save(x=x[:, :, None], y=y))
    assert images.x_train.mean() == pytest.approx(0, abs=1e-6)
    assert images.x_train.std() == pytest.approx(1, abs=1e-6)
    assert images.x_train[:, 0].std() < 0.01
    assert images.scaling.startswith("One mean")
    assert images.fingerprint != table.fingerprint


def test_fingerprint_follows_the_content(save):
    x, y = rows()
    first = load(save(x=x, y=y)).fingerprint
    assert load(save(x=x.copy(), y=y)).fingerprint == first
    x[5, 2] += 0.5
    assert load(save(x=x, y=y)).fingerprint != first


def test_test_part_is_unseen_by_the_scaling(save):
    x, y = rows()
    plain = load(save(x=x, y=y))
    # The split does not depend on values, so a huge test row leaves the training part as it was.
    row = int(np.flatnonzero((x == _unscaled(plain, x)[0]).all(1))[0])
    x[row] = 1e6
    assert (load(save(x=x, y=y)).x_train == plain.x_train).all()


def _unscaled(data, x):
    """Return the original rows of the test part, found by rank of the first feature."""
    both = np.concatenate([data.x_test, data.x_train])
    ranks = both[:, 0].argsort().argsort()
    return x[x[:, 0].argsort()][ranks][: len(data.x_test)]


X, Y = rows()
HOLE = X.copy()
HOLE[3, 1] = np.nan
BAD = {
    "no y": ({"x": X}, "arrays x and y; it holds x."),
    "lengths": ({"x": X, "y": Y[:-1]}, "120 rows in x and 119 labels"),
    "nan": ({"x": HOLE, "y": Y}, "NaN or infinity in 1 of 120"),
    "inf": ({"x": np.where(np.isnan(HOLE), np.inf, X), "y": Y}, "NaN or infinity in 1 of 120"),
    "float labels": ({"x": X, "y": Y.astype(float)}, "got shape (120,) of float64"),
    "one-hot labels": ({"x": X, "y": np.eye(3, dtype=int)[Y]}, "y.argmax(1)"),
    "one class": ({"x": X, "y": Y * 0}, "only class 0"),
    "few rows": ({"x": X[:60], "y": Y[:60]}, "at least 100 rows; got 60"),
    "rare class": ({"x": X, "y": np.where(np.arange(120) == 0, 9, Y)}, "1 in class 9"),
    "flat x": ({"x": X[:, 0], "y": Y}, "got shape (120,)"),
    "no feature": ({"x": X[:, :0], "y": Y}, "at least one feature"),
    "words": ({"x": X.astype(str), "y": Y}, "real numbers"),
    "complex": ({"x": X * 1j, "y": Y}, "real numbers"),
    "constant": ({"x": X * 0 + 3, "y": Y}, "3.0 everywhere"),
    "pickled": ({"x": np.array([None] * 120, dtype=object), "y": Y}, "numbers only"),
    "word labels": ({"x": X, "y": Y.astype(str)}, "numpy.unique(labels, return_inverse=True)"),
    "word objects": ({"x": X, "y": Y.astype(str).astype(object)}, "y holds Python objects"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD)
def test_bad_arrays_say_what_came_and_what_to_do(save, arrays, message):
    with pytest.raises(InputError) as error:
        load(save(**arrays))
    text = str(error.value)
    assert message in text
    assert "expected" in text
    assert "data.npz" in text


def test_bad_files_say_what_came_and_what_to_do(tmp_path, save):
    np.save(tmp_path / "single.npy", X)
    (tmp_path / "words.npz").write_text("not a zip archive")
    (tmp_path / "empty.npz").touch()
    whole = (tmp_path / save(x=X, y=Y)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": X, "y": Y}))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x", "text")
        archive.writestr("y", "text")
    for name, message in {
        "single.npy": "a single .npy array",
        "words.npz": "not an .npz archive",
        "empty.npz": "not an .npz archive",
        "cut.npz": "cut short",
        "pickle.npz": "not an .npz archive",
        "other.npz": "x in it is no array",
        "missing.npz": "there is no such file",
    }.items():
        with pytest.raises(InputError, match=r"numpy\.savez") as error:
            load(str(tmp_path / name))
        assert message in str(error.value)
        assert "allow_pickle" not in str(error.value)


def test_training_rows_that_are_all_alike_are_refused(save):
    x = np.zeros((120, 5))
    test_row = int(np.flatnonzero(np.isin(np.arange(120), _test_rows(save)))[0])
    x[test_row] = 1
    with pytest.raises(InputError, match="rows of the training part are all alike"):
        load(save(x=x, y=Y))


def _test_rows(save):
    numbered = np.arange(120.0)[:, None].repeat(5, 1)
    data = load(save(x=numbered, y=Y))
    both = np.concatenate([data.x_test, data.x_train])[:, 0]
    return both.argsort().argsort()[: len(data.x_test)]
