"""Where the time of one call goes: marks inside it, each of which ends a part. What bench --profile prints.

    watch = Watch("cpu")
    loss = loss_of(batch);  watch.mark("forward")
    loss.backward();        watch.mark("backward")
    watch.spent             # {"forward": ms, "backward": ms}; together the whole call

The marks stand in the step that is timed, not in a copy of it, so that the parts add up to the whole.
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
    """The `mark` of a call whose parts nobody asks for."""


class Watch:
    """mark(part): all the time since the last mark, or since the watch was made, goes to `part`, in ms.

    clock   one of CLOCKS: "wall", or "cpu", those of all threads of this process, which other work disturbs less
    """

    def __init__(self, device: str, clock: str = "wall"):
        self.device, self.clock, self.spent = device, CLOCKS[clock], {}
        synchronise(device)
        self.last = self.clock()

    def mark(self, part: str) -> None:
        synchronise(self.device)
        now = self.clock()
        self.spent[part] = self.spent.get(part, 0.0) + (now - self.last) * 1e3
        self.last = now


def borders(trunk: nn.Module, mark: Callable[[str], None]) -> list:
    """Marks where a network with blocks `h` and a last norm `ln_f` begins and ends, forward and backward.

    Backward, a border is passed when the gradient of what crosses it is known. -> hooks, to be removed afterwards.
    """

    def enter(_module, args: tuple) -> None:
        mark("rows looked up")
        args[0].register_hook(lambda _: mark("blocks, backward"))

    def leave(_module, _args: tuple, out) -> None:
        mark("blocks, forward")
        out.register_hook(lambda _: mark("softmax, backward"))

    return [trunk.h[0].register_forward_pre_hook(enter), trunk.ln_f.register_forward_hook(leave)]


def measure_parts(case, device: str, repeats: int, clock: str = "wall") -> dict:
    """Medians of every part of plain and of ours, which take turns after one call each that is not counted."""
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
    """The parts of one row, one a line, and their sum; a part that one version has not is a dash."""
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
