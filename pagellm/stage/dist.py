"""Several processes that train one model together, through torch.distributed, or one process alone.

    NPROC=2 make sft                torchrun --standalone --nproc_per_node 2 -m pagellm.sft ...

    device = start(config.device)   join the process group that torchrun describes, if there is one
    rows, busy = shard(index)       this process's rows of a batch
    total = all_reduce(tensor)      the sum over all processes

Every function also works in a single process, where it costs nothing. Only the main process (rank
0) writes files.

All processes draw the same random numbers (`randomness.rng`), so they agree on the rows of each
batch without exchanging them; `shard` then gives each process its own part.
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pagellm.stage.config import PageLLMError

__all__ = [
    "AsyncScalars",
    "MODES",
    "PRECISIONS",
    "all_gather",
    "all_reduce",
    "any_rank",
    "barrier",
    "cut",
    "divided",
    "gather",
    "idle",
    "is_main",
    "largest",
    "load_optimiser",
    "load_weights",
    "multiplies_bf16",
    "optimiser_state",
    "parts_of",
    "peak_memory",
    "pick_device",
    "pick_precision",
    "pieces",
    "rank",
    "send",
    "shard",
    "start",
    "stop",
    "sync_gradients",
    "unsharded",
    "weights",
    "world",
    "wrap",
]

Rows = TypeVar("Rows", np.ndarray, Tensor)


MODES = ("ddp", "fsdp", "rows")
PRECISIONS = ("auto", "float32", "bfloat16")
# The narrowest network that bfloat16 makes faster on a CPU, as experiments/precision.py measured
# it. In narrower networks the conversions cost more than the products gain.
BF16_WIDTH = 128
# Processes wait this long for each other: the main process may be busy with pairs or a validation.
TIMEOUT = timedelta(minutes=30)


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" takes cuda where there is one, else cpu.

    Raises PageLLMError for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(". ")[0][:160]
        raise PageLLMError(f"device={name!r} is not usable here ({why}); use cpu or auto") from None
    return device


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device.

    A copy to a GPU goes through pinned memory, and the CPU does not wait for it.
    """
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def pick_precision(name: str, device: torch.device, width: int) -> str:
    """The number format of the network's matrix products: "float32" or "bfloat16".

    name     one of PRECISIONS. "auto" takes bfloat16 if the processor has instructions for it and
             the network is at least BF16_WIDTH columns wide. It looks at the processor and never at
             a clock: the same machine must always choose the same format, however busy it is.
    width    columns of the network's hidden states
    """
    if name != "auto":
        return name
    return "bfloat16" if multiplies_bf16(device) and width >= BF16_WIDTH else "float32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16 products.

    CPUs with AMX or AVX512-BF16 have them, and GPUs from compute capability 8.0 on. Others emulate
    such products, slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tests = (
        getattr(torch.cpu, name, None)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return device.type == "cpu" and any(test() for test in tests if test)


def start(name: str) -> torch.device:
    """Join the process group if torchrun started this process, and return the device to work on.

    Processes exchange tensors through gloo on CPUs and through nccl on GPUs.
    """
    device = pick_device(name)
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not td.is_initialized():
        # On GPUs gloo is there too: `any_rank` exchanges a number that is on the CPU.
        td.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT
        )
        atexit.register(stop)
    return device


def stop() -> None:
    """Leave the process group.

    Drop wrapped models and their optimisers before the call: if one is freed later, gloo may abort
    the process.
    """
    if td.is_initialized():
        gc.collect()
        td.destroy_process_group()


def peak_memory() -> float:
    """The most memory used so far, in MB.

    Where a GPU is in use: memory allocated on the GPU that needed most. Else: resident memory of
    this process; 0 where the system does not tell.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return (
            max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
            / 2**20
        )
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere


def rank() -> int:
    """The number of this process, from 0."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files (rank 0)."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        td.barrier()


def shard(rows: Rows) -> tuple[Rows, bool]:
    """This process's part of a batch: rows `rank`, `rank + world`, `rank + 2 world`, ...

    rows     (n,) or (n, ...), n >= 1, the same on every process
    returns  the rows, and whether they count. With fewer rows than processes some get none. Such a
             process gets row 0 and False: it must still run the forward pass, because the others
             wait for it, but the row must have weight 0
    """
    mine = rows[rank() :: world()]
    return (mine, True) if len(mine) else (rows[:1], False)


def pieces(mine: Rows, size: int, together: bool = False) -> Iterator[tuple[Rows, bool]]:
    """This process's rows in pieces of `size`, and whether they count.

    mine      (n,) or (n, ...), n >= 1
    together  every process gets as many pieces, as it must where user and item rows are cut. A
              surplus piece is row 0 alone and does not count

    Call it on every process where `together`.
    """
    own = -(-len(mine) // size)
    count = largest(own) if together else own
    for at in range(count):
        yield (mine[at * size : (at + 1) * size], True) if at < own else (mine[:1], False)


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all processes, element by element. It carries no gradient."""
    if world() > 1:
        x = x.detach().clone()
        td.all_reduce(x)
    return x


def all_gather(value: Any) -> list[Any]:
    """The values that all processes pass, in order of rank.

    They may be any Python objects; torch pickles them on the way.
    """
    if world() == 1:
        return [value]
    values: list = [None] * world()
    td.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """The largest of the numbers that all processes pass.

    It goes from CPU to CPU, which is cheap enough for every step.
    """
    if world() == 1:
        return number
    x = torch.tensor(number)
    td.all_reduce(x, td.ReduceOp.MAX)
    return int(x)


def any_rank(flag: bool) -> bool:
    """True on every process if `flag` is True on any of them."""
    return bool(largest(int(flag)))


class AsyncScalars:
    """Scalars copied to the CPU in the background.

    scalars   float tensors without dimensions, all on one device

    On a GPU the constructor only queues the copy. `read` waits until that copy is done, but not for
    the work that was queued on the GPU after it.
    """

    def __init__(self, scalars: list[Tensor]):
        values = torch.stack([x.detach().double() for x in scalars]) if scalars else torch.zeros(0)
        self.event: torch.cuda.Event | None = None
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = values

    def read(self) -> list[float]:
        """The scalars' values, in the order in which they were given."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def gather(mine: np.ndarray) -> np.ndarray:
    """Undo `shard`: all processes' rows, in the order in which they were before, on every process.

    mine   (m, ...) this process's results for the rows that it got from `shard`; none (m = 0) if
           they did not count
    """
    if world() == 1:
        return mine
    parts = all_gather(mine)
    out = np.empty((sum(map(len, parts)), *mine.shape[1:]), dtype=mine.dtype)
    for at, rows in enumerate(parts):
        out[at :: world()] = rows
    return out


def wrap(module: nn.Module, mode: str) -> nn.Module:
    """Make the processes average their gradients in every backward pass through `module`.

    mode   "ddp": every process holds the whole model. "fsdp": parameters, gradients and moments are
           divided among the processes (FSDP2's fully_shard, which changes the module in place), and
           every step fetches all parameters. "rows": as fsdp, but user and item rows are `cut`. In
           one process the module is returned as it is

    As gradients are averaged, a loss that is a sum over the batch has to be multiplied by `world`
    in each process; `train.shared_means` does that. Every forward pass must use every parameter:
    see `idle`.
    """
    if world() == 1:
        return module
    if mode in ("fsdp", "rows"):
        from torch.distributed.fsdp import fully_shard

        if mode == "rows":
            cut(module)
        own = {p for p in module.parameters() if parts_of(p) is not None}
        return cast(nn.Module, fully_shard(module, reshard_after_forward=False, ignored_params=own))
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def cut(module: nn.Module, mode: str = "rows") -> nn.Module:
    """With mode "rows" and several processes, leave each with its share of user and item rows.

    For networks that `wrap` is not given: those that only judge or write pages. Rows that are cut
    already stay as they are.
    """
    if mode == "rows" and world() > 1:
        for part in module.modules():
            if hasattr(part, "cut") and getattr(part, "parts", None) is None:
                cast(Any, part).cut()
    return module


def parts_of(value: Any) -> Any:
    """How the rows of a parameter are divided among the processes for good; None: they are not.

    It is a kernels.parallel.Parts, an attribute that `cut` gives to a parameter.
    """
    return getattr(value, "parts", None)


def divided(value: Any) -> bool:
    """Whether `value` is a tensor (DTensor) or module that FSDP2 divides among the processes.

    torch's modules for that take 0.6 processor seconds to import. So they are imported where
    something is divided, in `wrap` and `like`; where they are not, nothing is.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    modules = sys.modules.get("torch.distributed.fsdp")
    return (tensors is not None and isinstance(value, tensors.DTensor)) or (
        modules is not None and isinstance(value, modules.FSDPModule)
    )


def idle(module: nn.Module) -> Tensor | float:
    """Zero, to be added to the loss when a forward pass does not use `module`.

    With several processes each parameter has to get a gradient in every backward pass, because the
    processes wait for each other's. This zero gives every parameter of `module` a gradient of 0. In
    one process it is the number 0.0.
    """
    return 0.0 if world() == 1 else 0.0 * sum(p.sum() for p in module.parameters())


@contextmanager
def unsharded(module: nn.Module):
    """Within the block every process holds the whole of a module that `wrap` divided among them.

    Use it where parameters are read outside the module's own forward pass, as in validation and
    rollouts.
    """
    if not divided(module):
        yield
        return
    whole = cast(Any, module)
    whole.unshard()
    try:
        yield
    finally:
        whole.reshard()


@contextmanager
def sync_gradients(module: nn.Module, last: bool):
    """Within the block a backward pass exchanges gradients among the processes only if `last`.

    last   whether this is the last backward pass before an optimiser step. Passes before it add up
           their gradients locally, so that one step costs one exchange

    In one process nothing is exchanged, and the block changes nothing.
    """
    if last or world() == 1:
        yield
    elif divided(module):
        cast(Any, module).set_requires_gradient_sync(False)
        yield
        cast(Any, module).set_requires_gradient_sync(True)
    else:
        with cast(DistributedDataParallel, module).no_sync():
            yield


def full(value: Any, parts: Any = None) -> Any:
    """A copy on the CPU of a whole tensor, also where it is divided among the processes.

    parts    of the parameter that the value is, or belongs to (`parts_of`). The rows of such a
             tensor come to the main process alone; the others get one without rows

    What is no tensor is returned as it is. Call it on every process.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if parts is not None and value.ndim:
        return whole_rows(value, parts)
    return (value.full_tensor() if divided(value) else value).cpu().clone()


def whole_rows(own: Tensor, parts: Any) -> Tensor:
    """The rows of all processes in the main one; in the others a tensor without rows."""
    if not is_main():
        if len(own):
            td.send(own.contiguous(), 0)
        return torch.empty((0, *own.shape[1:]), dtype=own.dtype)
    whole = torch.empty((parts.whole, *own.shape[1:]), dtype=own.dtype)
    whole[parts.first : parts.last] = own.cpu()
    for source in range(1, world()):
        first, last = parts.bounds(source)
        if last > first:
            came = own.new_empty((last - first, *own.shape[1:]))
            td.recv(came, source)
            whole[first:last] = came.cpu()
    return whole


def own_rows(whole: Tensor, parts: Any, device: torch.device) -> Tensor:
    """The inverse of `whole_rows`: this process's rows; only the main one need have them all."""
    if is_main():
        for to in range(1, world()):
            first, last = parts.bounds(to)
            if last > first:
                td.send(whole[first:last].to(device).contiguous(), to)
        return whole[parts.first : parts.last].to(device, copy=True)
    own = torch.empty(
        (parts.last - parts.first, *whole.shape[1:]), dtype=whole.dtype, device=device
    )
    if len(own):
        td.recv(own, 0)
    return own


def like(value: Any, parameter: Tensor) -> Any:
    """The inverse of `full`: a tensor placed and divided among the processes as `parameter` is.

    Scalars stay whole, and what is no tensor is returned as it is. Call it on every process.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if (parts := parts_of(parameter)) is not None:
        return own_rows(value, parts, parameter.device)
    value = value.to(parameter.device)
    if divided(parameter):
        from torch.distributed.tensor import distribute_tensor

        there = cast(Any, parameter)
        return distribute_tensor(value, there.device_mesh, there.placements)
    return value.clone()


def inner(module: nn.Module) -> nn.Module:
    """The module that was given to `wrap`: DistributedDataParallel keeps it in an attribute."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def weights(module: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """The state_dict of a module, as whole tensors on the CPU; cut rows in the main process only.

    module   as it was, or what `wrap` made of it: the names are the same
    frozen   False: leave out parameters that do not learn, which a checkpoint need not hold

    Call it on every process.
    """
    module = inner(module)
    left = set() if frozen else frozen_names(module)
    kept = module.state_dict(keep_vars=True).items()
    return {name: full(value, parts_of(value)) for name, value in kept if name not in left}


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the parameters that do not learn."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


@torch.no_grad()
def load_weights(module: nn.Module, values: dict[str, Tensor]) -> None:
    """The inverse of `weights`, whatever the number of processes was then and is now.

    Frozen parameters may be missing from `values`; they stay as they are. Raises PageLLMError if
    any other name is missing, or if there is a name that the module does not have.
    """
    module = inner(module)
    own = module.state_dict(keep_vars=True)
    if strange := (set(own) ^ set(values)) - (frozen_names(module) - set(values)):
        raise PageLLMError(f"the checkpoint's weights are not this model's: {sorted(strange)[:3]}")
    for name, value in values.items():
        own[name].copy_(like(value, own[name]))


def optimiser_state(module: nn.Module, opt: torch.optim.Optimizer) -> dict[str, dict]:
    """Parameter name -> the optimiser's state of that parameter: as `weights` gives the weights.

    Parameters that the optimiser has not moved yet are left out. Call it on every process.
    """
    name_of: dict[Tensor, str] = {p: name for name, p in inner(module).named_parameters()}
    return {
        name_of[p]: {key: full(value, parts_of(p)) for key, value in moments.items()}
        for p, moments in opt.state.items()
    }


def load_optimiser(module: nn.Module, opt: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    """The inverse of `optimiser_state`, whatever the number of processes was then and is now."""
    parameters = dict(inner(module).named_parameters())
    for name, moments in state.items():
        opt.state[parameters[name]] = {
            key: like(value, parameters[name]) for key, value in moments.items()
        }
        if opt.defaults["fused"]:
            # it keeps the count of steps beside the parameter
            opt.state[parameters[name]]["step"] = moments["step"].to(parameters[name].device)
