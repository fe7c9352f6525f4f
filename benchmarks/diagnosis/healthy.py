"""Healthy models: nothing is to be found in them."""

from __future__ import annotations

from typing import Any

import torch
from cases import case
from data import BATCH, DENSE, IMAGE, LINES, batches, padded
from networks import (
    Generator,
    Residual,
    Tokens,
    TwoDomains,
    cnn,
    depthwise,
    hugging_face,
    mlp,
    sequence,
    wide,
)
from torch import nn
from training import train, train_generator, trained

from batchnorm import BatchNorm, freeze


def _averaging(channels: int) -> nn.Module:
    return nn.BatchNorm1d(channels, momentum=None)


for _name, _make, _shape, _options in (
    ("MLP", mlp, DENSE, {}),
    ("MLP of our layers", lambda: mlp(BatchNorm), DENSE, {}),
    ("deep MLP", lambda: mlp(depth=6), DENSE, {}),
    ("MLP, plain average", lambda: mlp(_averaging), DENSE, {"lr": 0.01}),
    ("MLP, batches of 16", mlp, DENSE, {"size": 16, "steps": 600}),
    ("MLP, Adam", mlp, DENSE, {"adam": True}),
    ("MLP, ghost batches", lambda: mlp(lambda c: BatchNorm(c, virtual_batch_size=16)), DENSE, {}),
    ("CNN", cnn, IMAGE, {}),
    ("CNN of our layers", lambda: cnn(BatchNorm), IMAGE, {}),
    ("wide CNN", lambda: cnn(widths=(16, 32, 32)), IMAGE, {}),
    ("CNN, batches of 8", cnn, IMAGE, {"size": 8, "steps": 300}),
    ("depthwise CNN", depthwise, IMAGE, {}),
    ("residual network", Residual, IMAGE, {}),
    ("residual network, γ = 0 at first", lambda: Residual(BatchNorm, zero=True), IMAGE, {}),
    ("our layers, checkpointed", lambda: Residual(BatchNorm, checkpoint=True), IMAGE, {}),
    ("lines of an image as a sequence", sequence, LINES, {}),
    ("a layer for each of two domains", lambda: TwoDomains(False), DENSE, {}),
):  # fmt: skip

    @case(_name)
    def _healthy(make: Any = _make, shape: Any = _shape, options: Any = _options) -> Any:
        options = dict(options)
        if options.pop("adam", False):
            model = make()
            options["optimizer"] = torch.optim.Adam(model.parameters(), 1e-3)
            return trained(lambda: model, shape, **options)
        return trained(make, shape, **options)


@case("padded tokens, masked")
def _masked() -> Any:
    data = padded(16)
    return train(Tokens(True), data), data, {}


@case("frozen throughout")
def _all_frozen() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    freeze(model)
    return model, data, {}


@case("bfloat16, our layers")
def _bfloat16() -> Any:
    model, data, _ = trained(lambda: cnn(BatchNorm), IMAGE)
    data = [(x.bfloat16(), y) for x, y in data]
    return model.bfloat16(), data, {}


@case("dropout after the last layer, no weight decay on γ and β")
def _dropout_at_the_end() -> Any:
    model = mlp()
    model.insert(len(model) - 1, nn.Dropout(0.5))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    model, data, _ = trained(lambda: model, DENSE, optimizer=optimizer)
    return model, data, {"optimizer": optimizer}


@case("generator of images")
def _generator() -> Any:
    data = [(torch.randn(BATCH, 8), x) for x, _ in batches(IMAGE, 16)]
    return train_generator(Generator(), data), data, {}


for _name in ("ResNet", "RegNet"):

    @case(f"transformers' {_name}")
    def _transformers(name: str = _name) -> Any:
        data = batches(IMAGE, 8, 32)
        model = train(hugging_face(name), data, wide, lr=0.02, steps=120)
        return model, data, {"step": wide}
