"""Statistics of all processes, whatever each of them has: two processes by gloo, on one machine."""

import tempfile

import torch
from torch import distributed, multiprocessing

from batchnorm import BatchNorm

ROWS = 20, 12  # of each process


def work(rank: int, file: str) -> None:
    """One process: its own rows, everybody's statistics."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=len(ROWS)
    )
    x = torch.randn(sum(ROWS), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = BatchNorm(5, process_group="world").double()
    norm(x.split(ROWS)[rank])
    alone = BatchNorm(5).double()
    alone(x)
    apart = float((norm.running_var - alone.running_var).abs().max())
    print(f"process {rank}, {ROWS[rank]} rows: {apart:.0e} from one process with all", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (f"{folder}/store",), nprocs=len(ROWS))
