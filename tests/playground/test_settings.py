"""What can be trained with, and what is refused."""

import math

import pytest

pytest.importorskip("gradio")  # the package's import asks for it

from batchnorm.errors import ArgumentError
from batchnorm.playground.settings import RANGES, SettingError, Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 0), ("depth", 21), ("depth", 1000), ("depth", 2.5), ("depth", True),
        ("width", 7), ("width", 257), ("rate", 0), ("rate", -1), ("rate", math.nan),
        ("rate", math.inf), ("rate", "0.1"), ("rate", 101), ("batch", 1), ("batch", 513),
        ("steps", 4), ("steps", 5001), ("seed", -1), ("seed", None), ("activation", "gelu"),
        ("init", "zero"), ("init", None), ("activation", []),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(SettingError, match=rf"^{name}: expected .*, got .*; choose another$") as e:
        Settings(**{name: value})
    assert isinstance(e.value, ArgumentError)
    assert (e.value.name, e.value.value) == (name, value) or math.isnan(value)


@pytest.mark.parametrize("name", RANGES)
def test_the_limits_themselves_are_possible(name):
    limits = RANGES[name]
    for value in (limits.low, limits.high):
        assert getattr(Settings(**{name: value}), name) == value


def test_a_form_holds_numbers_or_text():
    form = {"depth": 4.0, "width": "32", "rate": " 1e-2 ", "batch": 8, "activation": "tanh"}
    read = Settings.read(form)
    assert read == Settings(depth=4, width=32, rate=0.01, batch=8, activation="tanh")
    assert all(type(getattr(read, name)) is int for name in ("depth", "width", "batch"))
    for name, value in (("rate", "abc"), ("rate", "nan"), ("rate", "0,1"), ("depth", ""),
                        ("depth", None), ("depth", 3.5), ("steps", "inf"), ("rate", [1]),
                        ("init", {}), ("rate", "0"), ("rate", "-1"),
                        ("steps", 10**400)):  # fmt: skip
        with pytest.raises(SettingError) as e:
            Settings.read({name: value})
        assert (e.value.name, e.value.value) == (name, value)
