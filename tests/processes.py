"""Run a check in several processes at once, which exchange through gloo."""

import sys

import torch
import torch.distributed as td
import torch.multiprocessing as mp

__all__ = ["in_processes"]


def in_processes(check, world, folder, *args):
    """Run check(rank, *args) in `world` processes; raise what one of them raises.

    folder  an empty one, where they find each other
    """
    how = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import torch again
    store = f"file://{folder}/store"
    mp.start_processes(joined, (check, world, store, args), nprocs=world, start_method=how)


def joined(rank, check, world, store, args):
    torch.set_num_threads(1)
    td.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    check(rank, *args)
    td.destroy_process_group()
