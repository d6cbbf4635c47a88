"""torch.distributed as torchrun starts it: several processes share one job, or there is one process alone.

    NPROC=2 make sft                torchrun --standalone --nproc_per_node 2 -m pagellm.sft ...

    device = start(config.device)   joins the group that torchrun describes; alone: nothing but a device
    rows, busy = part(index)        this process's part of a batch or of the users
    sums = total(tensor)            over all processes

Every function is also right in one process, where it costs nothing. Only the main process (rank 0) writes files.
The same random numbers are drawn whatever the number of processes (randomness.rng), so that all of them agree on what a
batch holds, and each takes its share.
"""

import atexit
import gc
import os
import resource
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
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
    "gather",
    "idle",
    "is_main",
    "load_optimiser",
    "load_weights",
    "multiplies_bf16",
    "optimiser_state",
    "peak_memory",
    "pick_device",
    "pick_precision",
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


MODES = ("ddp", "fsdp")
PRECISIONS = ("auto", "float32", "bfloat16")
# Columns from which bfloat16 was measured to pay on a CPU (experiments/precision.py); below, casts eat the gain.
BF16_WIDTH = 128
# the main process may make pairs or validate for long while the others wait
TIMEOUT = timedelta(minutes=30)


def pick_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu. Raises PageLLMError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PageLLMError(
            f"device={name!r} is not usable here ({str(error).splitlines()[0]}); use cpu or auto"
        ) from None
    return device


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device. To a GPU it goes from pinned memory, and nobody waits for it."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def pick_precision(name: str, device: torch.device, width: int) -> str:
    """ "auto" is bfloat16 where the processor multiplies it and the trunk is `width` >= BF16_WIDTH columns wide, else
    float32. By capability, not by a stopwatch: the same machine must choose alike whatever else it is doing.

    CPUs with AMX or AVX512-BF16, GPUs from compute capability 8.0. -> "float32" or "bfloat16"
    """
    if name != "auto":
        return name
    return "bfloat16" if multiplies_bf16(device) and width >= BF16_WIDTH else "float32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16 products; others emulate them, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tests = (
        getattr(torch.cpu, name, None)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return device.type == "cpu" and any(test() for test in tests if test)


def start(name: str) -> torch.device:
    """Join the processes of torchrun (gloo on CPUs, nccl on GPUs) if it started this one; -> the device to work on."""
    device = pick_device(name)
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not td.is_initialized():
        # gloo beside nccl: what processes tell each other about themselves is on the host and stays there.
        td.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT
        )
        atexit.register(stop)
    return device


def stop() -> None:
    """Leave the group. Wrapped models and their optimisers must be gone by then, or gloo may abort the process."""
    if td.is_initialized():
        gc.collect()
        td.destroy_process_group()


def peak_memory() -> float:
    """Largest memory so far in MB: allocated on the GPU that has most, where one is in use; else this process's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return (
            max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
            / 2**20
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        td.barrier()


def shard(rows: np.ndarray) -> tuple[np.ndarray, bool]:
    """This process's rows, every world-th from its rank on, and True; if that is none, the first row and False.

    The row of an idle process keeps it in step with the others; it must weigh nothing.
    """
    mine = rows[rank() :: world()]
    return (mine, True) if len(mine) else (rows[:1], False)


def all_reduce(x: Tensor) -> Tensor:
    """Sum over all processes."""
    if world() > 1:
        x = x.detach().clone()
        td.all_reduce(x)
    return x


def all_gather(value) -> list:
    """This value of every process, by rank."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    td.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """True on every process if it is True on one: one number from host to host, so cheap enough for every step."""
    if world() == 1:
        return flag
    x = torch.tensor(int(flag), dtype=torch.int32)
    td.all_reduce(x, td.ReduceOp.MAX)
    return bool(x)


class AsyncScalars:
    """Scalars (float, of one device) on their way to the host. `read` waits for them, not for what was queued since."""

    def __init__(self, scalars: list[Tensor]):
        values = torch.stack([x.detach().double() for x in scalars]) if scalars else torch.zeros(0)
        self.event = None
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = values

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def gather(mine: np.ndarray) -> np.ndarray:
    """Rows that `part` dealt out, back in their old order on every process. An idle process gives no rows."""
    if world() == 1:
        return mine
    parts = all_gather(mine)
    out = np.empty((sum(map(len, parts)), *mine.shape[1:]), dtype=mine.dtype)
    for at, rows in enumerate(parts):
        out[at :: world()] = rows
    return out


def wrap(module: nn.Module, mode: str) -> nn.Module:
    """The module whose backward leaves the same gradient on every process: the mean of all (so a loss is a share of
    the whole batch's, times `world`).

    ddp   every process holds everything        fsdp  parameters, gradients and moments are cut among processes
    (FSDP2's fully_shard, changed in place); alone: the module itself
    Every forward must use every parameter: see `idle`.
    """
    if world() == 1:
        return module
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(module, reshard_after_forward=False)
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def idle(module: nn.Module) -> Tensor | float:
    """0, with a gradient of 0 for every parameter of a module that a forward pass leaves out."""
    return 0.0 if world() == 1 else 0.0 * sum(p.sum() for p in module.parameters())


@contextmanager
def unsharded(module: nn.Module):
    """Within the block a module that `wrap` cut can be used outside its forward: validation, rollouts."""
    if not hasattr(module, "unshard"):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


@contextmanager
def sync_gradients(module: nn.Module, last: bool):
    """Only the last of several backward passes before a step exchanges gradients."""
    if last or world() == 1:
        yield
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    else:
        with module.no_sync():
            yield


def full(value):
    """A whole tensor on the CPU, whatever it was cut into; a copy. Ask on every process."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def like(value, parameter: Tensor):
    """A whole tensor cut and placed as `parameter` is; scalars stay whole."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()


def weights(module: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """Plain names -> whole tensors of a module, before or after `wrap`; frozen=False: without parameters that do not
    learn, as a checkpoint keeps them."""
    module = getattr(module, "module", module)
    left = set() if frozen else still(module)
    return {name: full(value) for name, value in module.state_dict().items() if name not in left}


def still(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


@torch.no_grad()
def load_weights(module: nn.Module, values: dict[str, Tensor]) -> None:
    """The inverse of `weights`, into any number of processes: frozen parameters may be absent and stay as they are.
    Raises PageLLMError for another set of names."""
    module = getattr(module, "module", module)
    own = module.state_dict()
    if strange := (set(own) ^ set(values)) - (still(module) - set(values)):
        raise PageLLMError(f"the checkpoint's weights are not this model's: {sorted(strange)[:3]}")
    for name, value in values.items():
        own[name].copy_(like(value, own[name]))


def optimiser_state(module: nn.Module, opt: torch.optim.Optimizer) -> dict[str, dict]:
    """Parameter name -> its moments, whole. Parameters that took no step yet are left out."""
    name_of = {p: name for name, p in getattr(module, "module", module).named_parameters()}
    return {
        name_of[p]: {key: full(value) for key, value in moments.items()}
        for p, moments in opt.state.items()
    }


def load_optimiser(module: nn.Module, opt: torch.optim.Optimizer, state: dict[str, dict]) -> None:
    """The inverse of `optimiser_state`."""
    parameters = dict(getattr(module, "module", module).named_parameters())
    for name, moments in state.items():
        opt.state[parameters[name]] = {
            key: like(value, parameters[name]) for key, value in moments.items()
        }
        if opt.defaults["fused"]:  # counts its steps where its parameters are
            opt.state[parameters[name]]["step"] = moments["step"].to(parameters[name].device)
