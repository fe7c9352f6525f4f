"""Who shares statistics: torchrun's processes, one that is alone, nobody; and what is no group."""

import pickle

import pytest
import torch
from torch import distributed

from batchnorm import ArgumentError, BatchNorm, SyncError
from batchnorm.sync import Synchronizer
from processes import launch


def test_under_torchrun(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, torch.distributed as dist\n"
        "from batchnorm import BatchNorm\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.arange(8.0).reshape(4, 2)[dist.get_rank() * 2 :][:2]\n"
        "bn = BatchNorm(2, process_group='world', momentum=1.0)\n"
        "bn(x)\n"
        "assert bn.running_mean.tolist() == [3.0, 4.0], bn.running_mean\n"
        "print('right')\n"
        "dist.destroy_process_group()\n"
        "from processes import leave\n"
        "leave()\n"
    )
    ((status, output),) = launch(program, 2, torchrun=True)
    assert status == 0, output
    assert output.count("right") == 2


def test_alone_in_a_group(tmp_path):
    """The plain layer, by the plain way; and a program's own errors stay what they are."""
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        bn, plain, x = BatchNorm(3, process_group="world"), BatchNorm(3), torch.randn(4, 3)
        assert torch.equal(bn(x), plain(x))
        assert bn(x.requires_grad_()).grad_fn.name() == plain(x).grad_fn.name()
        bn.process_group = distributed.group.WORLD
        assert pickle.loads(pickle.dumps(bn)).process_group == "world"

        def mistaken(_):
            raise RuntimeError("No backend type associated with device type cpu")

        sync = Synchronizer(distributed.group.WORLD)
        with pytest.raises(RuntimeError, match="No backend") as caught:
            sync._run(mistaken)
        assert not isinstance(caught.value, SyncError)
        sync.listen()  # nobody is gone
    finally:
        distributed.destroy_process_group()


def test_what_is_no_group():
    for wrong in ("World", 3, -100, object()):
        with pytest.raises(ArgumentError, match="process group"):
            BatchNorm(3, process_group=wrong)
    bn, x = BatchNorm(3, process_group="world"), torch.randn(4, 3)
    torch.testing.assert_close(bn(x), BatchNorm(3)(x))  # nobody to share with
    bn.process_group = "nobody"
    with pytest.raises(ArgumentError, match="process group"):
        bn(x)
