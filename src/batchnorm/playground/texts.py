"""What the playground says, in Chinese and in English."""

from __future__ import annotations

import html
from collections.abc import Mapping

from batchnorm.playground.settings import CHOICES, RANGES, SettingError, Settings
from batchnorm.playground.training import NORMALIZED, PLAIN, SPAN, Snapshot

#: By language, in its own words.
LANGUAGES = {"zh": "中文", "en": "English"}

_EN = {
    "title": "Batch normalization: the playground",
    "intro": (
        "Two networks learn to read handwritten digits. They begin with the same weights and see "
        "the same batches; one has batch normalization before every activation function, the other "
        "has none. Choose an example or settings of your own, and press Start."
    ),
    "language": "Language",
    "example": "Example",
    "start": "Start",
    "stop": "Stop",
    "reset": "Reset",
    # Controls
    "depth": "Hidden layers",
    "width": "Units in each",
    "activation": "Activation",
    "rate": "Learning rate",
    "exponent": "Rate: {low:g} to {high:g}".format(**vars(RANGES["rate"])),
    "batch": "Batch size",
    "init": "Initial weights",
    "steps": "Steps",
    "seed": "Seed",
    "init.Xavier": "Xavier",
    "init.He": "He",
    "init.0.01": "small: standard deviation 0.01",
    "init.1": "large: standard deviation 1",
    # Examples, and what to look at
    "preset.sigmoid": "Deep, with sigmoids",
    "look.sigmoid": (
        "The plain network stays at one digit in ten: its gradients shrink from layer to layer on "
        "their way to the input, the left end of the dashed line. With batch normalization the "
        "line is nearly level, and the network learns within a hundred steps."
    ),
    "preset.small": "Small initial weights",
    "look.small": (
        "In the plain network the signal dies away from layer to layer: look at σ beside the "
        "histograms. Batch normalization brings every layer back to about 1, whatever the scale of "
        "the weights."
    ),
    "preset.fast": "A large learning rate",
    "look.fast": (
        "The plain network diverges within the first ten steps. The one with batch normalization "
        "takes the same learning rate and learns."
    ),
    "preset.shallow": "One layer: little to gain",
    "look.shallow": (
        "With one hidden layer and suitable initial weights both networks learn about equally "
        "well. What batch normalization repairs is not broken here."
    ),
    "preset.deep": "20 layers: the gradients explode",
    "look.deep": (
        "Batch normalization has a price. At the start, the thin line, its gradients grow from the "
        "output to the input, and at a small learning rate the plain network with He's weights "
        "is ahead of it."
    ),
    "preset.tiny": "A batch of 2: worse",
    "look.tiny": (
        "A mean and a variance of two values are nearly chance: in training every value becomes +1 "
        "or −1 before γ and β, and in the test something else. The plain network is far ahead."
    ),
    # What happens
    "ready": "Ready: press Start.",
    "running": "Step {step} of {steps}. {accuracies}",
    "done": "Done: {step} steps. {accuracies}",
    "stopped": "Stopped at step {step} of {steps}. {accuracies}",
    "ended": "Ended at step {step} of {steps}: no network is left that could go on. {accuracies}",
    "none": "Stopped before the first step.",
    "accuracies": (
        "Test accuracy: plain {" + PLAIN + "}, with batch normalization {" + NORMALIZED + "}."
    ),
    "diverged." + PLAIN: "The plain network diverged at step {step}: {why}",
    "diverged." + NORMALIZED: "The network with batch normalization diverged at step {step}: {why}",
    "why": "its loss or its gradient is no finite number any more, and it was left there.",
    "refused.number": "{label}: expected a number from {low} to {high}, got {value}. {then}",
    "refused.whole": "{label}: expected a whole number from {low} to {high}, got {value}. {then}",
    "refused.choice": "{label}: expected one of {choices}, got {value}. {then}",
    "then": "Nothing was started: correct it and press Start again.",
    "nothing": "nothing",
    "quotes": "“{}”",
    "comma": ", ",
    # Pictures
    "loss": "Training loss: the mean of the last five batches",
    "accuracy": "Test accuracy: the share of 503 new digits that is read right",
    "gradients": (
        "Norm of the gradient by each layer's weights: bold now, thin at the start. The last layer "
        "is the output"
    ),
    "inputs": (
        "What the activation functions are given in a batch, layer by layer; what is beyond "
        f"±{SPAN:g} is counted at the edge"
    ),
}

_ZH = {
    "title": "批量归一化：实验场",
    "intro": (
        "两个网络学习识别手写数字。它们的初始权重相同，每一步看到的批次也相同；其中一个在每个激活函数之前"
        "有批量归一化（batch normalization），另一个没有。选一个例子，或自己设定，然后按“开始”。"
    ),
    "language": "语言",
    "example": "例子",
    "start": "开始",
    "stop": "停止",
    "reset": "重置",
    "depth": "隐藏层数",
    "width": "每层单元数",
    "activation": "激活函数",
    "rate": "学习率",
    "exponent": "学习率：{low:g} 到 {high:g}".format(**vars(RANGES["rate"])),
    "batch": "批次大小",
    "init": "初始权重",
    "steps": "步数",
    "seed": "随机种子",
    "init.Xavier": "Xavier",
    "init.He": "He",
    "init.0.01": "小：标准差 0.01",
    "init.1": "大：标准差 1",
    "preset.sigmoid": "较深，用 sigmoid",
    "look.sigmoid": (
        "十个数字里普通网络只认对一个，与瞎猜无异：它的梯度在传向输入的路上逐层缩小，看虚线的左端。有批量归一化时，"
        "这条线几乎是平的，网络在一百步之内就学会了。"
    ),
    "preset.small": "初始权重很小",
    "look.small": (
        "普通网络里的信号逐层消失：看直方图旁边的 σ。不论权重的尺度如何，批量归一化都把每一层拉回到"
        " 1 左右。"
    ),
    "preset.fast": "学习率很大",
    "look.fast": "普通网络在最初十步之内就发散了。有批量归一化的网络用同样的学习率，照样学会。",
    "preset.shallow": "只有一层：没有多少好处",
    "look.shallow": (
        "只有一个隐藏层而且初始权重合适时，两个网络学得差不多一样好。批量归一化要修补的毛病，在这里并不存在。"
    ),
    "preset.deep": "20 层：梯度爆炸",
    "look.deep": (
        "批量归一化有代价。训练开始时（细线），它的梯度从输出到输入逐层增大；在小学习率下，"
        "用 He 初始权重的普通网络走在它前面。"
    ),
    "preset.tiny": "批量为 2：更差",
    "look.tiny": (
        "两个值的均值和方差几乎全凭运气：训练时，每个值在乘 γ 加 β 之前都变成 +1 或 −1，"
        "测试时却是另一回事。普通网络遥遥领先。"
    ),
    "ready": "就绪：请按“开始”。",
    "running": "第 {step} 步，共 {steps} 步。{accuracies}",
    "done": "完成：{step} 步。{accuracies}",
    "stopped": "停在第 {step} 步，共 {steps} 步。{accuracies}",
    "ended": "在第 {step} 步结束，共 {steps} 步：已经没有网络能继续训练。{accuracies}",
    "none": "在第一步之前就停止了。",
    "accuracies": "测试准确率：普通 {" + PLAIN + "}，有批量归一化 {" + NORMALIZED + "}。",
    "diverged." + PLAIN: "普通网络在第 {step} 步发散：{why}",
    "diverged." + NORMALIZED: "有批量归一化的网络在第 {step} 步发散：{why}",
    "why": "它的损失或梯度已不是有限的数，训练就停在那里。",
    "refused.number": "{label}：应为 {low} 到 {high} 之间的数，得到的是{value}。{then}",
    "refused.whole": "{label}：应为 {low} 到 {high} 之间的整数，得到的是{value}。{then}",
    "refused.choice": "{label}：应为 {choices} 之一，得到的是{value}。{then}",
    "then": "训练没有开始：请改正后再按“开始”。",
    "nothing": "空白",
    "quotes": "“{}”",
    "comma": "、",
    "loss": "训练损失：最近五个批次的平均",
    "accuracy": "测试准确率：503 个新数字中认对的比例",
    "gradients": "各层权重的梯度范数：粗线是现在，细线是训练开始时。最后一层是输出层",
    "inputs": f"一个批次中激活函数的输入，逐层给出；超出 ±{SPAN:g} 的计在边上",
    # The pictures' own words
    "step": "步数",
    "training loss": "训练损失",
    "test accuracy": "测试准确率",
    "layer": "层",
    "gradient norm": "梯度范数",
    "value": "值",
    PLAIN: "普通",
    NORMALIZED: "批量归一化",
}

Words = Mapping[str, str]

TEXTS: Mapping[str, Words] = {"zh": _ZH, "en": _EN}


def choices(words: Words, name: str) -> dict[str, str]:
    """Return what the values of a setting are called.

    >>> choices(TEXTS["en"], "init")["1"]
    'large: standard deviation 1'
    """
    return {key: words.get(f"{name}.{key}", key) for key in CHOICES[name]}


def refusal(words: Words, error: SettingError) -> str:
    """Say what is wrong with a setting.

    >>> refusal(TEXTS["en"], SettingError("batch", 1))
    'Batch size: expected a whole number from 2 to 512, got “1”. Nothing was started: ...'
    """
    empty = error.value is None or error.value == ""
    said = words["nothing"] if empty else words["quotes"].format(error.value)
    known = {"label": words[error.name], "value": said, "then": words["then"]}
    if error.name in CHOICES:
        listed = words["comma"].join(choices(words, error.name).values())
        return words["refused.choice"].format(choices=listed, **known)
    limits = RANGES[error.name]
    kind = "refused.whole" if limits.whole else "refused.number"
    return words[kind].format(low=f"{limits.low:g}", high=f"{limits.high:g}", **known)


def progress(words: Words, state: str, settings: Settings, shot: Snapshot) -> list[str]:
    """Say how far a run is: a sentence, and one for each network that has diverged."""
    accuracies = words["accuracies"].format(
        **{arm: f"{look.accuracy:.1%}" for arm, look in shot.looks.items()}
    )
    sentences = [words[state].format(step=shot.step, steps=settings.steps, accuracies=accuracies)]
    sentences += [
        words[f"diverged.{arm}"].format(step=look.diverged, why=words["why"])
        for arm, look in shot.looks.items()
        if look.diverged is not None
    ]
    return sentences


def paragraph(sentences: list[str], kind: str) -> str:
    """Return the status line as HTML."""
    lines = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="status {kind}" role="status">{lines}</div>'
