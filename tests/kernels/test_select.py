"""Which kernels serve which call, and that what is reported is what happens."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from batchnorm import backends, batch_norm
from batchnorm.kernels import native, select, triton


def backend(x, training=True, **options):
    statistics = torch.zeros(6), torch.ones(6)
    x = x.requires_grad_()
    return batch_norm(x, *statistics, training=training, **options).grad_fn.backend


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
@pytest.mark.parametrize("training", [True, False])
def test_the_native_kernels_serve_whatever_is_eager_on_the_cpu(training):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backend(torch.randn(8, 6).to(dtype), training) == "native"
        assert backend(torch.randn(8, 4, 6).to(dtype), training, channel_dim=2) == "native"
    assert backend(torch.randn(8, 6), training, mask=torch.ones(8)) == "native"
    assert backend(torch.randn(8, 6) + 100, training) == "native"
    assert backend(torch.randn(8, 6, 4)[..., ::2], training) == "native"
    # What they leave to others.
    assert backend(torch.randn(8, 6), training, residual=torch.randn(8, 6).double()) == "reference"
    if training:
        assert backend(torch.randn(8, 6), momentum=torch.tensor(0.1)) == "aten"


def test_the_native_kernels_are_built_where_they_can_be():
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    if compiler and "BATCHNORM_DISABLE" not in os.environ:
        assert native.MISSING is None


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("training", [True, False])
def test_choice(training):
    assert backend(torch.randn(8, 6), training) == "aten"
    assert backend(torch.randn(8, 6, 4), training) == "aten"
    assert backend(torch.randn(8, 6).double(), training) == "reference"
    assert backend(torch.randn(8, 4, 6), training, channel_dim=2) == "reference"
    assert backend(torch.randn(8, 6), training, mask=torch.ones(8)) == "reference"
    assert backend(torch.randn(8, 6) + 100, True) == "reference"


@pytest.mark.usefixtures("without_native")
def test_evaluation_looks_at_the_offset_of_the_running_statistics():
    y = batch_norm(torch.randn(8, 6, requires_grad=True), torch.full((6,), 100.0), torch.ones(6))
    assert y.grad_fn.backend == "reference"


@pytest.mark.usefixtures("without_native")
def test_planes_too_large_for_torchs_backward_go_to_the_reference():
    """Forward by torch, backward from its statistics, widened: float32 sums would be 1e-5 off."""
    x = torch.randn(2, 3, 80, 80)
    dy = torch.ones(2, 3, 80, 80)
    weight, bias = torch.randn(3), torch.randn(3)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = batch_norm(leaves[0], None, None, *leaves[1:], True)
        gradients.append(torch.autograd.grad(y, leaves, dy.to(dtype)))
    assert y.grad_fn is not None
    assert backend(torch.randn(2, 6, 80, 80)) == "aten"
    (dx, dweight, dbias), want = gradients
    assert torch.equal(dbias, torch.full((3,), 12800.0))
    # dx and dγ of a constant dy are zero but for the rounding of the saved mean, |m| · 2⁻²⁴ < 1e-8
    # of 12800 values for dγ, and of their mean for dx.
    torch.testing.assert_close(dweight.double(), want[1], rtol=0, atol=2e-4)
    torch.testing.assert_close(dx.double(), want[0], rtol=0, atol=2e-8)


def test_report_reads_as_a_sentence():
    backend = select.Backend("fast", True, "everything", "it can")
    assert str(backend) == "fast: serves everything. Why: it can."
    backend = select.Backend("fast", False, "everything", "no compiler was found")
    assert str(backend).startswith("fast: not available; would serve everything. Why: no")


def test_report_is_read_on_80_columns_and_nothing_is_lost():
    for backend in backends():
        first, *others = str(backend).splitlines()
        assert others
        assert first.startswith(f"{backend.name}: ")
        assert all(line.startswith("    ") for line in others)
        assert max(map(len, [first, *others])) <= 80
        words = " ".join(str(backend).split())
        assert words.endswith(f" {backend.serves}. Why: {backend.reason}.")


def test_a_name_that_is_no_backends_is_told_where_it_may_have_been_meant(monkeypatch):
    monkeypatch.setenv("BATCHNORM_DISABLE", "tritn,native")
    told = [b.name for b in backends() if "names 'tritn', expected native or triton" in b.reason]
    assert told == ["native", "triton"]
    monkeypatch.setenv("BATCHNORM_DISABLE", "native,,triton")
    assert not [b for b in backends() if "expected native or triton" in b.reason]


def test_the_first_thing_that_triton_misses_is_what_no_installing_would_mend(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(triton, "_DISABLED", False)
    monkeypatch.setattr(triton, "ABSENT", "triton is not installed")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.missing() == "torch finds no CUDA GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert triton.missing() == "torch finds no CUDA GPU (it is built without CUDA)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton.missing() == "triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6")
    assert triton.missing() == "they have not been tried with ROCm"
    monkeypatch.setattr(triton, "INTERPRETED", True)  # which needs Triton and nothing else
    assert triton.missing() == "triton is not installed"
    monkeypatch.setattr(triton, "ABSENT", None)
    assert triton.missing() is None


INTERPRETED = """
import torch
from batchnorm import backends, batch_norm
from batchnorm.kernels import native, triton
ran = []
for kernels in (native, triton):
    if native.MISSING is None or kernels is triton:
        def forward(*args, kernels=kernels, call=kernels.forward):
            ran.append(kernels.NAME)
            return call(*args)
        kernels.forward = forward
batch_norm(torch.randn(4, 3), None, None, training=True)
print(*ran, "unless BATCHNORM_DISABLE=native" in backends()[1].reason)
"""


@pytest.mark.parametrize("disabled", ["", "native"])
def test_the_interpreter_gets_what_the_report_says_that_it_does(disabled):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "BATCHNORM_DISABLE": disabled}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
    )
    first = native.MISSING is None and not disabled
    assert done.stdout == ("native True\n" if first else "triton False\n"), done.stderr


def test_report_names_what_serves():
    names = {b.name: b.available for b in backends()}
    assert names == {
        "native": native.MISSING is None,
        "triton": triton.missing() is None,
        "aten": True,
        "reference": True,
    }
    assert all(b.serves and b.reason for b in backends())


@pytest.mark.usefixtures("without_native")
def test_report_says_what_is_missing():
    missing = backends()[0]
    assert (missing.name, missing.available) == ("native", False)
    assert str(missing).endswith("Why: a test does without them.")


def test_concrete():
    assert select.concrete(torch.randn(3))
    assert select.concrete(torch.nn.Parameter(torch.randn(3)))
    assert not select.concrete(torch.empty(3, device="meta"))
    assert not select.eager(torch.empty(3, device="meta"))
    with FakeTensorMode():
        assert not select.eager(torch.empty(3))
    seen = []
    torch.func.vmap(lambda t: seen.append(select.concrete(t)) or t)(torch.randn(2, 3))
    torch.func.grad(lambda t: (seen.append(select.concrete(t)), t.sum())[1])(torch.randn(3))
    assert seen == [False, False]


def test_saved_statistics_are_copies():
    """Training on, or DDP's broadcast, changes running buffers between forward and backward."""
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(8, 6, dtype=dtype, requires_grad=True)
        mean, var = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
        dy = torch.randn(8, 6, dtype=dtype)
        want = torch.autograd.grad(batch_norm(x, mean, var), x, dy)[0]
        y = batch_norm(x, mean, var)
        mean.fill_(torch.nan)
        var.fill_(torch.nan)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], want)
