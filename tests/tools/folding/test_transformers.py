"""Real architectures with random weights: every batch norm layer goes, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import fold
from folds import count

transformers = pytest.importorskip("transformers")

MODELS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "groups_width": 4},
    "MobileNetV2": {"depth_multiplier": 0.125, "depth_divisible_by": 4},
    "EfficientNet": {
        "width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 32, "hidden_dim": 320,
    },
    # Linear layers on (N, L, C) with a batch norm on (N·L, C).
    "Levit": {
        "image_size": 32, "hidden_sizes": [8, 16, 16], "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1], "key_dim": [4, 4, 4],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # other people's code
@pytest.mark.parametrize("name", MODELS)
def test_every_batch_norm_is_folded(name):
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # weights of a size that lets the numbers through, and real statistics
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
                nn.init.ones_(layer.weight)
                layer.momentum = None
        for _ in range(2):
            model.train()(torch.randn(8, 3, 32, 32))
    folded = fold(model, {"pixel_values": x})
    report = folded.fold_report
    assert count(folded) == 0, report.left
    assert len(report.folded) == count(model) > 10
    assert report.error64 < 1e-12
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x).logits
        assert y.std() > 0.01
        torch.testing.assert_close(folded(x).logits, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
