"""Presets: options that were found to fit a data set, one text file for each data set and command.

    runs/<run>/preset/<command>           of one run, as `pagellm tune` found it; looked at first
    presets/<dataset>/<command>           in the working directory: your own
    pagellm/presets/<dataset>/<command>   in the package

A preset of the package is named by its path below pagellm/presets: toys/sft. Any other is named by
its path: presets/myshop/sft.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["find", "has_one", "resolve"]


OWN = Path("presets")
PACKAGED = Path(str(files("pagellm"))) / "presets"


def find(dataset: str, *names: str, run: Path | None = None) -> str | None:
    """The name of a run's or a data set's preset; None where there is none.

    names  the command, with a folder before it or not: "sft", or "backbones", "sft"
    run    the run's directory, whose own preset is looked at first
    """
    if run is not None and run.joinpath("preset", *names).is_file():
        return str(run.joinpath("preset", *names))
    if not dataset or dataset != Path(dataset).name:
        return None
    own = OWN.joinpath(dataset, *names)
    if own.is_file():
        return str(own)
    inside = Path(dataset, *names)
    return inside.as_posix() if (PACKAGED / inside).is_file() else None


def has_one(dataset: str, run: Path | None = None) -> bool:
    """Whether options were found for the network of this run or data set."""
    return any(find(dataset, stage, run=run) for stage in ("pretrain", "sft"))


def resolve(name: str) -> Path:
    """The file of a preset from its path, or from its name in the package. It need not exist."""
    return Path(name) if Path(name).exists() or not (PACKAGED / name).is_file() else PACKAGED / name
