"""The package as a whole: its public names, what importing it needs, what it ships."""

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import torch

import batchnorm

PUBLIC = {
    "ArgumentError",
    "BatchNorm",
    "BatchNormError",
    "BatchNormLSTM",
    "BatchNormOutput",
    "Diagnosis",
    "Finding",
    "FoldError",
    "FoldReport",
    "InputError",
    "MemorySavings",
    "MissingDependencyError",
    "Moments",
    "NonFiniteWarning",
    "Recalibration",
    "Renorm",
    "SyncError",
    "accumulate_statistics",
    "backends",
    "bank",
    "batch_norm",
    "batch_norm_pure",
    "convert",
    "diagnose",
    "fold",
    "forward_together",
    "freeze",
    "from_flax",
    "from_keras",
    "inspect_checkpoint",
    "param_groups",
    "pause_statistics",
    "recalibrate",
    "revert",
    "save_memory",
    "sync_statistics",
    "to_flax",
    "to_keras",
    "unfreeze",
}

#: Which elements make the statistics, besides the mask.
POPULATION = ["virtual_batch_size", "renorm", "process_group"]


def test_public_names():
    modules = {path.stem for path in Path(batchnorm.__file__).parent.iterdir()}
    assert {name for name in vars(batchnorm) if not name.startswith("_")} - modules == PUBLIC
    for name in PUBLIC:
        assert getattr(batchnorm, name).__doc__


def test_signatures_are_torchs_and_the_rest_is_by_name():
    def parameters(function):
        every = inspect.signature(function).parameters.values()
        by_name = [p.name for p in every if p.kind is p.KEYWORD_ONLY]
        return [p.name for p in every if p.name not in by_name], by_name

    positional, _ = parameters(torch.nn.functional.batch_norm)
    for function in (batchnorm.batch_norm, batchnorm.batch_norm_pure):
        ours, by_name = parameters(function)
        assert ours == ["x", *positional[1:]]
        assert by_name == ["mask", "residual", "channel_dim", "activation", *POPULATION]
    positional, _ = parameters(torch.nn.BatchNorm2d)
    ours, by_name = parameters(batchnorm.BatchNorm)
    assert ours == positional
    assert by_name == ["features", "bias", "channel_dim", "activation", *POPULATION]
    assert parameters(batchnorm.BatchNorm.forward)[0] == ["self", "x", "mask", "residual"]


def test_one_base_class():
    for name in PUBLIC:
        thing = getattr(batchnorm, name)
        if isinstance(thing, type) and issubclass(thing, Exception):
            assert issubclass(thing, (batchnorm.BatchNormError, Warning))


def test_version_is_the_distributions():
    assert batchnorm.__version__ == importlib.metadata.version("batchnorm")


def test_importing_and_using_the_layer_needs_torch_only():
    """With every other dependency made impossible to import, the outline's sample still runs."""
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"numpy", "typer", "rich", "joblib", "matplotlib", "sklearn",
                                  "jinja2", "click", "scipy", "safetensors"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import torch
from batchnorm import BatchNorm
y = BatchNorm(features=10)(torch.randn(64, 10))
assert abs(float(y.mean())) < 1e-6 and abs(float(y.var(0, correction=0).mean()) - 1) < 1e-3
assert "batchnorm.lab" not in sys.modules and "batchnorm.cli" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_typed_marker_and_licence_are_shipped():
    root = Path(batchnorm.__file__).parent
    assert (root / "py.typed").exists()
    assert (root / "kernels" / "README.md").exists()
    files = importlib.metadata.metadata("batchnorm")
    assert files["License-Expression"] == "MIT"
