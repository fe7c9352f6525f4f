"""One fault each."""

from __future__ import annotations

from typing import Any

import torch
from cases import case
from data import BATCH, DENSE, IMAGE, batches, digits, padded
from networks import Residual, Rows, Tokens, TwoDomains, cnn, hugging_face, mlp, wide
from torch import Tensor, nn
from torch.nn import functional
from training import train, trained

from batchnorm import BatchNorm


@case("never trained", "BN105")
def _untrained() -> Any:
    return cnn(), batches(IMAGE, 16), {}


@case("counters and statistics reset after training", "BN105", layer="4")
def _reset() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    model[4].reset_running_stats()
    return model, data, {}


@case("ten updates", "BN102")
def _ten() -> Any:
    return trained(cnn, IMAGE, steps=10)


@case("momentum 0.001", "BN102", "BN101")
def _slow() -> Any:
    return trained(lambda: mlp(lambda c: nn.BatchNorm1d(c, momentum=0.001)), DENSE)


@case("momentum 0", "BN201")
def _zero() -> Any:
    return trained(lambda: mlp(lambda c: nn.BatchNorm1d(c, momentum=0.0)), DENSE)


@case("momentum 1", "BN201")
def _one() -> Any:
    return trained(lambda: mlp(lambda c: nn.BatchNorm1d(c, momentum=1.0)), DENSE)


@case("Keras's momentum 0.99", "BN201")
def _keras() -> Any:
    return trained(lambda: cnn(lambda c: nn.BatchNorm2d(c, momentum=0.99)), IMAGE)


@case("data of another scale", "BN101", layer="1")
def _scale() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    return model, [(16 * x, y) for x, y in data], {}


@case("negatives of the images", "BN101")
def _negative() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    return model, [(1 - x, y) for x, y in data], {}


@case("noisy images", "BN101")
def _noisy() -> Any:
    model, data, _ = trained(lambda: cnn(BatchNorm), IMAGE)
    return model, [(x + torch.randn_like(x), y) for x, y in data], {}


@case("weights trained on with the statistics frozen", "BN101")
def _stale() -> Any:
    model, data, _ = trained(mlp, DENSE)
    kept = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    with torch.no_grad():
        for k in (0, 3):
            model[k].weight.add_(0.3 * torch.randn_like(model[k].weight))
    model.load_state_dict(model.state_dict() | kept)
    return model, data, {}


@case("a learning rate that was high to the end", "BN101")
def _reckless() -> Any:
    model, data = Residual(), batches(IMAGE, 16)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    return train(model, data, steps=80, optimizer=optimizer, ends_low=False), data, {}


@case("one layer's statistics loaded into another", "BN101", layer="blocks.0.4")
def _swapped() -> Any:
    model, data, _ = trained(Residual, IMAGE)
    other = model.blocks[1][1].state_dict()
    model.blocks[0][4].load_state_dict(
        model.blocks[0][4].state_dict() | {k: v * 4 for k, v in other.items() if "running" in k}
    )
    return model, data, {}


@case("NaN in the statistics", "BN103", layer="1")
def _nan() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    model[1].running_mean[2] = torch.nan
    return model, data, {}


@case("running variance 0", "BN104", layer="4")
def _no_variance() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    model[4].running_var[1] = 0
    return model, data, {}


@case("buffers in bfloat16", "BN106")
def _half() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    return model.bfloat16(), [(x.bfloat16(), y) for x, y in data], {}


@case("channels behind a ReLU that never opens", "BN304", layer="1")
def _dead() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    with torch.no_grad():
        model[1].bias[:3] = -20
    return model, data, {}


@case("channels with a constant input", "BN304", layer="4")
def _constant() -> Any:
    model = cnn()
    with torch.no_grad():
        model[3].weight[:4] = 0
    model[3].weight.register_hook(lambda g: g * (torch.arange(16) >= 4)[:, None, None, None])
    return trained(lambda: model, IMAGE)


@case("batches of 2, dense", "BN301")
def _two() -> Any:
    return trained(mlp, DENSE, size=2, steps=600, lr=0.01)


@case("batches of 2, images at one pixel", "BN301")
def _pixel() -> Any:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 8, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Linear(16, 10),
        )  # fmt: skip

    return trained(make, IMAGE, size=2, steps=600, lr=0.01)


@case("batches of one class each", "BN302")
def _sorted() -> Any:
    model, _, _ = trained(cnn, IMAGE)
    x, y = digits()
    order = y.argsort(stable=True)
    x, y = x[order].reshape(-1, *IMAGE), y[order]
    rows = torch.arange(len(x)).split(BATCH)[:20]
    return model, [(x[row], y[row]) for row in rows], {}


@case("two classes in each batch", "BN308", "BN302")
def _two_classes() -> Any:
    x, y = digits()
    data = []
    for _ in range(16):
        some = (y[:, None] == torch.randperm(10)[:2]).any(1).nonzero().flatten()
        rows = some[torch.randperm(len(some))[:BATCH]]
        data.append((x[rows].reshape(-1, *IMAGE), y[rows]))
    return train(Residual(), data), data, {}


@case("padding in sequences", "BN303", layer="norm")
def _padding() -> Any:
    data = padded(16)
    return train(Tokens(False), data), data, {}


@case("padding among rows", "BN303", layer="norm")
def _padded_rows() -> Any:
    data = padded(16)
    return train(Rows(), data), data, {}


@case("one layer for two domains", "BN206", layer="norm")
def _shared() -> Any:
    return trained(lambda: TwoDomains(True), DENSE)


@case("activation checkpointing", "BN108", layer="blocks.0.1")
def _checkpointed() -> Any:
    return trained(lambda: Residual(checkpoint=True), IMAGE)


@case("half of the layers frozen by hand", "BN205")
def _half_frozen() -> Any:
    model, data, _ = trained(Residual, IMAGE)
    for layer in (model.norm, model.blocks[0][1]):
        layer.eval()
    return model, data, {}


@case("a layer left in training", "BN207")
def _left() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    model.eval()[1].train()
    return model, data, {}


@case("bias before", "BN202", layer="1")
def _bias() -> Any:
    model = cnn()
    model[0] = nn.Conv2d(1, 8, 3, padding=1)
    return trained(lambda: model, IMAGE)


@case("dropout before", "BN203", layer="6")
def _dropout() -> Any:
    model = mlp()
    model.insert(3, nn.Dropout(0.5))
    model.insert(4, nn.Identity())
    model, data, _ = trained(lambda: model, DENSE)
    return model, data, {}


@case("functional dropout right before", "BN203", layer="norm")
def _functional_dropout() -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = (
                nn.Linear(64, 32),
                nn.BatchNorm1d(32),
                nn.Linear(32, 10),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = functional.dropout(self.first(x).relu(), 0.3, self.training)
            return self.head(self.norm(x))

    return trained(Net, DENSE)


@case("weight decay on γ and β", "BN204", layer="1")
def _decay() -> Any:
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    model, data, _ = trained(lambda: model, IMAGE, optimizer=optimizer)
    return model, data, {"optimizer": optimizer}


@case("a layer that nothing reaches", "BN208", layer="spare")
def _spare() -> Any:
    model, data, _ = trained(Residual, IMAGE)
    model.spare = nn.BatchNorm2d(16)
    return model, data, {}


@case("infinity in a batch", "BN305", layer="1")
def _infinite() -> Any:
    model, data, _ = trained(cnn, IMAGE)
    data[3][0][5, 0, 2, 2] = torch.inf
    return model, data, {}


@case("transformers' MobileNetV1 as it comes, with TensorFlow's momentum", "BN201")
def _mobilenet() -> Any:
    data = batches(IMAGE, 8, 32)
    model = train(hugging_face("MobileNetV1"), data, wide, lr=0.02, steps=30)
    return model, data, {"step": wide}
