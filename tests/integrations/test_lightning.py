"""The callback, in a real Trainer."""

import pickle
import sys

import pytest
import torch
from torch import nn

from batchnorm import ArgumentError, BatchNorm, MissingDependencyError


def test_without_lightning(monkeypatch):
    from batchnorm.integrations import lightning

    monkeypatch.delitem(vars(lightning), "RecalibrateCallback", raising=False)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="pip install lightning"):
        from batchnorm.integrations.lightning import RecalibrateCallback  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'Callback'"):
        lightning.Callback  # noqa: B018


class Data(torch.utils.data.Dataset):
    """The first element is the input."""

    def __init__(self, n=40):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, 3, generator=generator) * 2 + 9

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], 0


def fit(batches=None, callbacks=(), **options):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), BatchNorm(4, momentum=0.001))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            x, _ = batch if isinstance(batch[0], torch.Tensor) else batch[0]
            return (self(x) * torch.arange(4)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, batches or torch.utils.data.DataLoader(Data(), 8))
    return module


pytestmark = [
    pytest.mark.slow,
    # Lightning's advice, and its own use of what is deprecated.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def callback(**options):
    pytest.importorskip("lightning.pytorch")
    from batchnorm.integrations.lightning import RecalibrateCallback

    return RecalibrateCallback(**options)


def assert_statistics(module, x):
    h = module.net[0](x)
    torch.testing.assert_close(module.net[1].running_mean, h.mean(0))
    torch.testing.assert_close(module.net[1].running_var, h.var(0))


@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_the_training_data_at_the_end_of_training(method):
    told = callback(method=method)
    module = fit(callbacks=[told])
    assert_statistics(module, Data().x)
    assert told.report.batches == 5
    assert told.report.layers[0].name == "net.1"
    # Ten batches at a momentum of 0.001 had left it nearly where it began, at 0.
    assert told.report.layers[0].mean_drift > 1


@pytest.mark.parametrize(("limit", "most", "used"), [(3, None, 3), (1.0, 2, 2), (3, 2, 2)])
def test_a_part_of_the_training_data(limit, most, used):
    told = callback(max_batches=most)
    module = fit(callbacks=[told], limit_train_batches=limit)
    assert told.report.batches == used
    assert_statistics(module, Data().x[: 8 * used])


def test_other_data_by_another_step():
    x = torch.randn(20, 3)
    told = callback(batches=[{"image": x}], step=lambda model, batch: model(batch["image"]))
    assert_statistics(fit(callbacks=[told]), x)


def test_the_precision_of_training():
    seen = []
    told = callback(step=lambda model, batch: seen.append(model(batch[0]).dtype))
    module = fit(callbacks=[told], precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        h = torch.cat([module.net[0](part) for part in Data().x.split(8)])
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(module.net[1].running_var, h.double().var(0).float())
    assert set(seen) == {torch.bfloat16}


def test_averaged_weights_come_first():
    """Statistics of the averaged network: what comes into a layer behind weights."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    module = fit(callbacks=[callbacks.WeightAveraging(), callback()])
    last = fit()
    assert not torch.equal(module.net[0].weight, last.net[0].weight)
    assert_statistics(module, Data().x)


def test_several_loaders_are_refused():
    loaders = [torch.utils.data.DataLoader(Data(), 8) for _ in range(2)]
    with pytest.raises(ArgumentError, match=r"expected one training loader .*, got a list"):
        fit(batches=loaders, callbacks=[callback()])


@pytest.mark.parametrize("options", [
    {"method": "layer"}, {"max_batches": 0}, {"process_group": 7}, {"batches": torch.randn(4, 3)},
    {"batches": [torch.randn(4, 3)], "step": 7}, {"batches": iter([]), "method": "layerwise"},
    {"step": 7},
], ids="-".join)  # fmt: skip
def test_impossible_options_are_refused_before_training(options):
    with pytest.raises(ArgumentError, match="expected"):
        callback(**options)


def test_what_cannot_work_at_the_end_is_told_at_the_start():
    lightning = pytest.importorskip("lightning.pytorch")
    steps = []

    class Bare(lightning.LightningModule):
        def __init__(self, *layers):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), *layers)

        def training_step(self, batch, _):
            steps.append(0)
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def run(module, told, loader=None):
        loader = loader or torch.utils.data.DataLoader(Data(), 8)
        lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[told],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, loader)  # fmt: skip

    with pytest.raises(ArgumentError, match=r"module with a forward\(\), .*, got Bare with none"):
        run(Bare(BatchNorm(4)), callback())
    with pytest.raises(ArgumentError, match="expected a model with batch norm layers"):
        run(Bare(), callback(step=lambda module, batch: module.net(batch[0])))
    with pytest.raises(ArgumentError, match="expected one training loader"):
        run(Bare(BatchNorm(4)), callback(), [torch.utils.data.DataLoader(Data(), 8)] * 2)
    assert not steps
    module = Bare(BatchNorm(4))
    run(module, callback(step=lambda module, batch: module.net(batch[0])))
    assert_statistics(module, Data().x)
    module = Bare(BatchNorm(4))
    module.forward = module.net.forward  # of this instance alone
    run(module, callback())
    assert_statistics(module, Data().x)


def test_it_can_be_pickled():
    again = pickle.loads(pickle.dumps(callback(max_batches=7)))
    assert again.max_batches == 7
