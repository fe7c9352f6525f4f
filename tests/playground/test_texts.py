"""Both languages say the same, of everything that can happen."""

import re
from string import Formatter

import pytest

pytest.importorskip("gradio")  # the package's import asks for it

from batchnorm.lab.data import load
from batchnorm.playground.presets import PRESETS
from batchnorm.playground.settings import CHOICES, EVERY, RANGES, SettingError, Settings
from batchnorm.playground.texts import TEXTS, paragraph, progress, refusal
from batchnorm.playground.training import (
    NORMALIZED,
    PLAIN,
    Look,
    Snapshot,
)

#: What Matplotlib draws in English, and only Chinese puts something in the place of.
DRAWN = {"step", "training loss", "test accuracy", "layer", "gradient norm", "value", *CHOICES}


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def places(text):
    return sorted(field for _, field, _, _ in Formatter().parse(text) if field is not None)


def test_both_languages_say_the_same():
    zh, en = TEXTS["zh"], TEXTS["en"]
    assert set(zh) - set(en) == {*DRAWN, PLAIN, NORMALIZED} - set(CHOICES)
    for key, text in en.items():
        assert places(zh[key]) == places(text), key
        # A number that one of them names, the other names, too.
        assert NUMBER.findall(zh[key]) == NUMBER.findall(text), key


def test_every_setting_and_example_has_its_words():
    for words in TEXTS.values():
        for name in (*RANGES, *CHOICES):
            assert words[name]
        for name in PRESETS:
            assert words[f"preset.{name}"]
            assert words[f"look.{name}"]
        for init in CHOICES["init"]:
            assert words[f"init.{init}"]


def test_numbers_in_words_are_those_of_the_code():
    data = load("digits")
    assert (data.classes, EVERY) == (10, 5)
    for words, digits, every in (
        (TEXTS["en"], "one digit in ten", "the last five batches"),
        (TEXTS["zh"], "十个数字", "最近五个批次"),
    ):
        assert digits in words["look.sigmoid"]
        assert every in words["loss"]
        assert str(len(data.y_test)) in words["accuracy"]
        for name, number in (("deep", PRESETS["deep"].depth), ("tiny", PRESETS["tiny"].batch)):
            assert str(number) in words[f"preset.{name}"]


def test_chinese_uses_its_own_punctuation():
    for key, text in TEXTS["zh"].items():
        assert not re.search(r"[一-鿿][,;:?!.]", text), key


@pytest.mark.parametrize(
    ("error", "en", "zh"),
    [
        (
            SettingError("rate", "abc"),
            "Learning rate: expected a number from 0.0001 to 100, got “abc”. ",
            "学习率：应为 0.0001 到 100 之间的数，得到的是“abc”。",
        ),
        (
            SettingError("depth", 1000),
            "Hidden layers: expected a whole number from 1 to 20, got “1000”. ",
            "隐藏层数：应为 1 到 20 之间的整数，得到的是“1000”。",
        ),
        (
            SettingError("seed", None),
            "Seed: expected a whole number from 0 to 9999, got nothing. ",
            "随机种子：应为 0 到 9999 之间的整数，得到的是空白。",
        ),
        (
            SettingError("activation", "gelu"),
            "Activation: expected one of sigmoid, tanh, ReLU, got “gelu”. ",
            "激活函数：应为 sigmoid、tanh、ReLU 之一，得到的是“gelu”。",
        ),
        (
            SettingError("init", None),
            "Initial weights: expected one of Xavier, He, small: standard deviation 0.01, large: "
            "standard deviation 1, got nothing. ",
            "初始权重：应为 Xavier、He、小：标准差 0.01、大：标准差 1 之一，得到的是空白。",
        ),
    ],
)
def test_a_refusal_names_the_control_and_what_came(error, en, zh):
    assert refusal(TEXTS["en"], error).startswith(en)
    assert refusal(TEXTS["en"], error).endswith("correct it and press Start again.")
    assert refusal(TEXTS["zh"], error) == zh + "训练没有开始：请改正后再按“开始”。"


def test_what_has_diverged_is_said():
    looks = {PLAIN: Look(1, 0.0755, (), (), diverged=4), NORMALIZED: Look(1, 0.98, (), ())}
    shot = Snapshot(40, looks)
    assert progress(TEXTS["en"], "running", Settings(steps=300), shot) == [
        "Step 40 of 300. Test accuracy: plain 7.5%, with batch normalization 98.0%.",
        "The plain network diverged at step 4: its loss or its gradient is no finite number any "
        "more, and it was left there.",
    ]
    assert progress(TEXTS["zh"], "stopped", Settings(steps=300), shot) == [
        "停在第 40 步，共 300 步。测试准确率：普通 7.5%，有批量归一化 98.0%。",
        "普通网络在第 4 步发散：它的损失或梯度已不是有限的数，训练就停在那里。",
    ]


def test_what_was_typed_is_text_not_html():
    said = paragraph([refusal(TEXTS["en"], SettingError("rate", "<img src=x>"))], "refused")
    assert "&lt;img src=x&gt;" in said
    assert "<img" not in said
