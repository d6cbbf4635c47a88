"""What a shop of millions would cost on 1, 8 and 64 GPUs: extrapolated from parts measured here.

    python -m experiments.cost.extrapolate --users 10000000 --items 5000000 --size gpt2

Measured on this machine, from one real SFT step at two small shop sizes: floating-point operations
of the trunk per token and parameter, and of the item softmax per slot, item and column (every
matrix product is counted); bytes of weights, gradient and moments per row (AdamW after a step). The
rest is multiplication with the GPU's specification, which is given as options. Prints a table and
one line of JSON. None of its times was observed at that size. Takes seconds.
"""

import json
import sys
from dataclasses import asdict, dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagellm.model.gpt2 import GPT2, SIZES, Shape
from pagellm.model.page_loss import Batch, sft_loss
from pagellm.stage.command import main
from pagellm.stage.config import check, check_numbers
from pagellm.stage.train import optimiser

__all__ = ["Config", "Measured", "estimate", "measure", "run"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Memory and time of SFT for a large shop, extrapolated from measured parts."""

    users: int = 10_000_000  # users of the shop
    items: int = 5_000_000  # items of the shop
    size: str = "gpt2"  # shape of the trunk
    tokens: int = 72  # tokens of a user's prompt and page together
    slots: int = 10  # slots of a user's page
    candidates: int = 8192  # items drawn for the softmax of a step (sampled_items)
    batch: int = 512  # users in a step on each GPU
    tflops: float = 400.0  # speed of bf16 matrix products on one GPU (about half of an H200's peak)
    memory_gb: float = 141.0  # memory of one GPU
    near_gbs: float = 450.0  # GB/s between the 8 GPUs of a machine
    far_gbs: float = 50.0  # GB/s of each GPU between machines

    def __post_init__(self):
        check_numbers(self)
        check(
            self,
            size=(self.size in SIZES, f"one of {', '.join(SIZES)}"),
            **{
                name: (getattr(self, name) > 0, "above 0")
                for name in (
                    "users",
                    "items",
                    "tokens",
                    "slots",
                    "candidates",
                    "batch",
                    "tflops",
                    "memory_gb",
                    "near_gbs",
                    "far_gbs",
                )
            },
        )


@dataclass(frozen=True)
class Measured:
    """What a step costs, forward and backward.

    trunk  FLOP per token and parameter of a block. The last block computes the page's positions
           only, but is counted like the others: slightly too much
    head   FLOP per slot, item and column
    state  bytes of weights, gradient and moments per element of a row
    """

    trunk: float
    head: float
    state: float


def trunk_parameters(shape: Shape) -> int:
    """Number of parameters in the blocks' matrices: 12 C^2 a layer."""
    return 12 * shape.n_layer * shape.n_embd**2


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, forward and backward.

    Those inside the attention kernel are left out; they are few, because prompts are short.
    """

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")

    def __init__(self):
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.NAMES:
            left, right = args[-2:] if "add" in func._schema.name else args[:2]
            self.flop += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def measure() -> Measured:
    """Measure the parts of a step.

    Two shops that differ in their number of items give the head's operations; two networks that
    differ by a block give a block's. The shops have so many items that the softmax recomputes its
    logits in the backward pass, as it must in a large shop (logprob.KEEP).
    """
    counted, fewer, more = [], 20_000, 40_000
    slots, tokens, users = 8, 24, 16
    for layers, items in ((2, fewer), (2, more), (3, fewer)):
        torch.manual_seed(0)
        shape = Shape(layers, 2, 64, 64)
        model = GPT2(shape, 300, 50, items, dropout=0.0)
        item = torch.stack([torch.randperm(items)[:slots] for _ in range(users)])
        prompt = torch.randint(0, 300, (users, tokens - slots))
        batch = Batch(
            prompt,
            torch.ones_like(prompt, dtype=torch.bool),
            item,
            torch.ones_like(item, dtype=torch.bool),
            torch.full((users, 1), -1),
        )
        with Products() as products:
            sft_loss(model, batch, "list").backward()
        counted.append(products.flop)
    head = (counted[1] - counted[0]) / (users * slots * (more - fewer) * shape.n_embd)
    trunk = (counted[2] - counted[0]) / (users * tokens * trunk_parameters(Shape(1, 2, 64, 64)))
    opt = optimiser(model, 1e-3)
    opt.step()
    kept = [model.item, model.item.grad, *(x for x in opt.state[model.item].values() if x.ndim)]
    state = sum(x.numel() * x.element_size() for x in kept) / model.item.numel()
    return Measured(trunk, head, state)


def estimate(config: Config, parts: Measured, gpus: int) -> dict[str, float]:
    """GB on each GPU and hours for an epoch with DDP, FSDP and cut rows (`dist.wrap`).

    With cut rows the trunk is fetched as by FSDP, and states, rows that are read, and a few numbers
    a slot travel instead of tables. `drawn` is that with a softmax over drawn items.
    """
    C, trunk = SIZES[config.size].n_embd, trunk_parameters(SIZES[config.size])
    elements = (config.users + config.items) * C + trunk
    weights = 4 * elements / 1e9  # float32
    state = parts.state * elements / 1e9
    read = parts.trunk * config.tokens * trunk
    head, drawn = (parts.head * config.slots * n * C for n in (config.items, config.candidates))
    speed = gpus * config.tflops * 1e12 * 3600
    steps = config.users / (config.batch * gpus)
    link = (config.near_gbs if gpus <= 8 else config.far_gbs) * 3600
    # All-gather of weights and reduce-scatter of gradients each move (W - 1) / W of them through
    # every GPU, and so do states that are gathered, or rows and their gradients.
    moved = 2 * (gpus - 1) / gpus
    of_trunk, of_row = moved * 4 * trunk / 1e9, moved * 4 * C / 1e9
    rows = of_trunk + of_row * config.batch * config.tokens
    cut = rows + of_row * config.batch * gpus * config.slots
    whole = 2.0 if gpus > 1 else 0.0  # gathered weights, and the gradient before scattering
    return {
        "gpus": gpus,
        "weights_gb": weights,
        "ddp_gb": state,
        "fsdp_gb": state / gpus + whole * weights,
        "cut_gb": state / gpus + whole * 4 * trunk / 1e9,
        "compute_hours": config.users * (read + head) / speed,
        "drawn_hours": config.users * (read + drawn) / speed,
        "trunk_share": read / (read + head),
        "fsdp_wire_hours": steps * moved * weights / link,
        "cut_wire_hours": steps * cut / link,
        "drawn_wire_hours": steps * (rows + of_row * config.candidates) / link,
    }


def run(config: Config) -> list[dict]:
    parts = measure()
    rows = [estimate(config, parts, gpus) for gpus in (1, 8, 64)]
    print(
        f"measured: trunk {parts.trunk:.2f} FLOP a token and parameter, item softmax "
        f"{parts.head:.2f} FLOP a slot, item and column, {parts.state:.0f} bytes a row element\n"
        f"{config.users:,} users x {config.items:,} items, {config.size}, {config.slots} slots, "
        f"batch {config.batch} a GPU of {config.memory_gb:g} GB and {config.tflops:g} TFLOP/s\n"
    )
    names = ("ddp", "fsdp", "cut"), ("compute", "drawn"), ("fsdp_wire", "cut_wire", "drawn_wire")
    print(
        f"{'GPUs':>4}{'GB a GPU: ddp':>16}{'fsdp':>8}{'rows cut':>10}"
        f"{'hours an epoch: all items':>27}{'drawn':>8}"
        f"{'wires: fsdp':>13}{'rows cut':>10}{'cut, drawn':>12}   fits"
    )
    for row in rows:
        fits = [name for name in names[0] if row[f"{name}_gb"] < 0.8 * config.memory_gb]
        memory = [f"{row[f'{name}_gb']:.0f}" for name in names[0]]
        hours = [f"{row[f'{name}_hours']:.3f}" for name in (*names[1], *names[2])]
        cells = zip((*memory, *hours), (16, 8, 10, 27, 8, 13, 10, 12), strict=True)
        print(
            f"{row['gpus']:>4}"
            + "".join(f"{cell:>{width}}" for cell, width in cells)
            + f"   {', '.join(fits) or 'none'}"
        )
    print(f"the item softmax is {1 - rows[0]['trunk_share']:.0%} of the arithmetic")
    print(json.dumps({"config": asdict(config), "parts": asdict(parts), "rows": rows}))
    return rows


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.cost.extrapolate"))
