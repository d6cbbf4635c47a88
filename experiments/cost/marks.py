"""Marks divide one timed call into named parts; `bench --profile` prints the time of each part.

A mark is a call mark(name) inside the code that is timed. It ends a part: the time since the mark
before it is added to the part `name`.

    watch = Watch("cpu")
    loss = loss_of(batch);  watch.mark("forward")
    loss.backward();        watch.mark("backward")
    watch.spent             # {"forward": ms, "backward": ms}; together the whole call

Marks lie in the very step that `bench` times, not in a copy of it, so the parts add up to the
whole. A call that is not profiled gets `unmarked`, which does nothing.
"""

import statistics
import time
from collections.abc import Callable

from torch import nn

from pagellm.kernels.bench import synchronise

__all__ = ["CLOCKS", "Watch", "borders", "measure_parts", "parts_table", "unmarked"]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HEADER = ("plain ms", "share", "ours ms", "share")


def unmarked(_part: str) -> None:
    """The `mark` of a call that is not profiled: does nothing."""


class Watch:
    """Adds up the time of each part, in ms, in `spent`.

    clock   "wall", or "cpu": processor time of all threads of this process, which other work on the
            machine disturbs less
    """

    def __init__(self, device: str, clock: str = "wall"):
        self.device, self.clock = device, CLOCKS[clock]
        self.spent: dict[str, float] = {}
        synchronise(device)
        self.last = self.clock()

    def mark(self, part: str) -> None:
        """End a part: the time since the last mark, or since the watch was made, is added to it."""
        synchronise(self.device)
        now = self.clock()
        self.spent[part] = self.spent.get(part, 0.0) + (now - self.last) * 1e3
        self.last = now


def borders(trunk: nn.Module, mark: Callable[[str], None]) -> list:
    """Put marks before the blocks `h` and after the last norm `ln_f` of a network.

    They end the parts "rows looked up" and "blocks, forward" in the forward pass. In the backward
    pass, once the gradient at the same place is known, they end "softmax, backward" and "blocks,
    backward". Returns the hooks, which the caller removes.
    """

    def enter(_module, args: tuple) -> None:
        mark("rows looked up")
        args[0].register_hook(lambda _: mark("blocks, backward"))

    def leave(_module, _args: tuple, out) -> None:
        mark("blocks, forward")
        out.register_hook(lambda _: mark("softmax, backward"))

    first, last = trunk.get_submodule("h.0"), trunk.get_submodule("ln_f")
    return [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]


def measure_parts(case, device: str, repeats: int, clock: str = "wall") -> dict:
    """Median ms of every part of plain and of ours.

    The two take turns; the first call of each is not counted. case: a bench.Case
    """
    runs: dict[str, list[dict]] = {"plain": [], "ours": []}
    for turn in range(repeats + 1):
        for name, kept in runs.items():
            watch = Watch(device, clock)
            getattr(case, name)(watch.mark)
            watch.mark("rest")
            if turn:
                kept.append(watch.spent)
    scale = {"plain": case.scale, "ours": 1.0}
    found = {"row": case.name, "shape": case.shape}
    for name, kept in runs.items():
        found[f"{name}_ms"] = statistics.median(sum(spent.values()) for spent in kept) * scale[name]
        found[f"{name}_parts"] = {
            part: statistics.median(spent[part] for spent in kept) * scale[name] for part in kept[0]
        }
    return found


def parts_table(found: dict) -> str:
    """What measure_parts returns as text: one line for each part, then the sum.

    A part that one of the two versions does not have is a dash.
    """
    title = f"{found['row']}, {found['shape']}"
    lines = [f"{title:<42}" + "".join(f"{name:>10}" for name in HEADER)]
    for part in dict.fromkeys((*found["ours_parts"], *found["plain_parts"], "all")):
        line = f"  {part:<40}"
        for name in ("plain", "ours"):
            whole = found[f"{name}_ms"]
            spent = whole if part == "all" else found[f"{name}_parts"].get(part)
            line += (
                f"{'–':>10}{'':>10}" if spent is None else f"{spent:>10.1f}{spent / whole:>10.0%}"
            )
        lines.append(line)
    return "\n".join(lines)
