"""Where --out may lead: never into what another command made, and never over a file of others."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json
from pagellm.stage.order import STAGES

__all__ = ["check_above", "check_file", "check_folder", "is_json_with", "is_stage"]

# Directories of a run that commands make and read under these names.
NAMES = {*STAGES, "evaluate", "baselines", "tune", "update", "storefront", "simulator", "preset"}
NAMES |= {"recommend", "tensorboard"}


def is_stage(folder: Path) -> bool:
    """Whether a command of PageLLM keeps its options and results in this directory."""
    path = folder / "config.json"
    try:
        return path.is_file() and read_json(path).keys() >= {"config", "inputs"}
    except (PageLLMError, AttributeError, OSError):  # of something else, or not for us to read
        return False


def is_json_with(path: Path, *names: str) -> bool:
    """Whether a file is a JSON object that has these names."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(value, dict) and value.keys() >= set(names)


def holder(folder: Path) -> str:
    """What a directory holds that a command made: "a prepared data set"; "" if it is none."""
    if (folder / "source.json").is_file() and (folder / "interactions.parquet").is_file():
        return "a prepared data set"
    return f"what the stage {folder.name} made" if is_stage(folder) else ""


def above(path: Path) -> Iterator[Path]:
    """The directories that a path lies in, links followed."""
    yield from path.absolute().resolve().parents


def refuse(out: Path, holds: str, instead: str) -> None:
    """Raise the PageLLMError of this module."""
    raise PageLLMError(f"--out {out}: {holds}; nothing was written\n  {instead}")


def check_above(out: Path, instead: str = "Name another place with --out.") -> None:
    """Raise PageLLMError if `out` lies in a directory that another command keeps."""
    for folder in above(out):
        if holds := holder(folder):
            refuse(out, f"{folder.name} holds {holds}", instead)


def check_file(out: Path, mine: Callable[[Path], bool], anywhere: bool = False) -> None:
    """Raise PageLLMError if the file must not be written: before any work is done.

    mine      whether a file that is there is an earlier one of this command, which is replaced
    anywhere  it may lie among the files of a stage

    A directory, a file of something else, and a place among the files of a stage or of a data set
    are left alone.
    """
    instead = "Name another file with --out."
    if out.is_dir():
        refuse(out, "it is a directory", "Name a file in it.")
    if not anywhere:
        check_above(out, instead)
    if out.exists() and not mine(out):
        refuse(out, "it is a file of something else", instead)


def check_folder(
    out: Path, mine: Callable[[Path], bool], run: Path | None = None, own: str = ""
) -> None:
    """Raise PageLLMError if files must not be written into a directory: before any work is done.

    mine  whether a directory that is there is an earlier one of this command
    run   directory of the run, if --out is a name in it: names of stages are refused then, even
          where the stage has not been run
    own   the one of these names that is this command's

    What another command made, a whole run, a data set, and a directory of other files are left
    alone. An empty directory is taken.
    """
    instead = "Name another directory with --out."
    place = out.absolute().resolve()
    if out.exists() and not out.is_dir():
        refuse(out, "it is a file", instead)
    check_above(out, instead)
    if run is not None and run.absolute().resolve() in place.parents:
        first = place.relative_to(run.absolute().resolve()).parts[0]
        if first in NAMES - {own}:
            refuse(out, f"{first} is the directory of another command", instead)
    if not place.is_dir() or mine(place):
        return
    if holds := holder(place):
        refuse(out, f"it holds {holds}", instead)
    if any(is_stage(inside) for inside in place.iterdir() if inside.is_dir()):
        refuse(out, "it is a whole run", instead)
    if any(not inside.name.startswith(".") for inside in place.iterdir()):
        refuse(out, "it holds something else", instead)
