"""What processes started by `batchnorm.lab.ranks` are given to do in tests: they import it."""

import os
import signal
import time

import torch
from torch import distributed


def add_up(rank, world, start):
    total = torch.tensor([start + rank])
    distributed.all_reduce(total)
    return rank, world, int(total), torch.get_num_threads()


def fail(rank, world):
    raise ValueError("the cause")


def die(rank, world, who):
    if rank == who:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def print_much(rank, world):
    print("x" * 1_000_000, flush=True)
    return rank


def hang(rank, world, folder=None):
    if folder:
        (folder / f"rank{rank}").write_text(str(os.getpid()))
    time.sleep(600)
