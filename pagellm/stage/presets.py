"""Presets: options that were found to fit a data set, one text file for each data set and command.

    presets/<dataset>/<command>           in the working directory: your own; looked at first
    pagellm/presets/<dataset>/<command>   in the package

A preset of the package is named by its path below pagellm/presets: toys/sft. One of your own is
named by its path: presets/myshop/sft.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["find", "resolve"]


OWN = Path("presets")
PACKAGED = Path(str(files("pagellm"))) / "presets"


def find(dataset: str, *names: str) -> str | None:
    """The name of a data set's preset, here or in the package; None where there is none.

    names  the command, with a folder before it or not: "sft", or "backbones", "sft"
    """
    if not dataset or dataset != Path(dataset).name:
        return None
    own = OWN.joinpath(dataset, *names)
    if own.is_file():
        return str(own)
    inside = Path(dataset, *names)
    return inside.as_posix() if (PACKAGED / inside).is_file() else None


def resolve(name: str) -> Path:
    """The file of a preset from its path, or from its name in the package. It need not exist."""
    return Path(name) if Path(name).exists() or not (PACKAGED / name).is_file() else PACKAGED / name
