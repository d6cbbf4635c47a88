"""The command `pagellm`: `pagellm ppo --dataset toys` is `python -m pagellm.ppo --dataset toys`."""

import difflib
import importlib
import sys

from pagellm import __version__
from pagellm.stage.command import main as run_main

__all__ = ["VERBS", "main"]


VERBS = {
    "prepare": "pagellm.data.prepare",
    "download": "pagellm.data.download",
    "pretrain": "pagellm.pretrain",
    "sft": "pagellm.sft",
    "reward": "pagellm.reward",
    "ppo": "pagellm.ppo",
    "evaluate": "pagellm.evaluate",
    "export": "pagellm.serving.export",
    "recommend": "pagellm.serving.recommend",
    "features": "pagellm.serving.features",
    "serve": "pagellm.serving.serve",
}


def main() -> int:
    argv = sys.argv[1:]
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(
            f"usage: pagellm <stage> [--field value ...]     stages, in order: {', '.join(VERBS)}\n"
            "       pagellm <stage> --help                  every field of a stage\n"
            "       pagellm --version"
        )
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"stages: {', '.join(VERBS)}"
        print(f"pagellm: no stage {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[argv[0]])
    return run_main(module.Config, module.run, VERBS[argv[0]], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
