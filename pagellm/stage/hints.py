"""Commands and names that messages suggest, as the reader can type them.

In a checkout, where the Makefile stands in the working directory beside this package, they are
targets of make. Elsewhere, where a wheel was installed, they are `pagellm <command>`.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "another_run",
    "command",
    "counted",
    "in_checkout",
    "install",
    "nearest",
    "other_data",
    "other_runs",
    "prepare",
    "study",
]


PACKAGE = Path(__file__).resolve().parents[1]


def counted(n: int, what: str, many: str = "") -> str:
    """ "1 row", "1,200 rows": a number and what it counts, given in the singular.

    many  the plural where it is not the singular and an s: person, people
    """
    return f"{n:,} {what}" if n == 1 else f"{n:,} {many or what + 's'}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of `known` that is most like a mistyped name; "" where none is.

    cutoff  how alike at least: 0 anything, 1 the same
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), "")


def in_checkout() -> bool:
    """Whether `make` in the working directory runs this package."""
    try:
        here = Path.cwd()
        return (here / "Makefile").is_file() and (here / PACKAGE.name).resolve() == PACKAGE
    except OSError:  # the working directory has been removed
        return False


def command(verb: str, dataset: str = "", run: str = "", seed: str = "", **options: str) -> str:
    """The command that runs `verb`: "make sft DATASET=toys" or "pagellm sft --dataset toys".

    A verb of two words is one target: `pagellm storefront page` is `make storefront-page`.

    dataset, run, seed  left out if empty
    options             others, for `pagellm` only: data="elsewhere"
    """
    given = {"dataset": dataset, "run": run, "seed": seed}
    if in_checkout():
        target = verb.replace(" ", "-")
        return " ".join([f"make {target}", *(f"{k.upper()}={v}" for k, v in given.items() if v)])
    return " ".join([f"pagellm {verb}", *(f"--{k} {v}" for k, v in (given | options).items() if v)])


def study(name: str, dataset: str, args: str = "") -> str:
    """The command that runs a study, which a checkout has and a wheel has not."""
    if in_checkout():
        return f"make {name} DATASET={dataset}" + (f' ARGS="{args}"' if args else "")
    words = f"python -m experiments.{name} --dataset {dataset} {args}".rstrip()
    return f"{words}   (in a checkout of the source)"


def prepare(dataset: str, data: str = "data") -> str:
    """The command that prepares a data set, and how it is told where the raw files are."""
    elsewhere = {} if data == "data" else {"data": data}
    told = "RAW=" if in_checkout() else "--raw "
    return f"{command('prepare', dataset, **elsewhere)} [{told}directory of the raw files]"


def install(extra: str, target: str = "") -> str:
    """The command that installs an extra; in a checkout also the make target that does so."""
    also = f", or run make {target or extra}" if in_checkout() else ""
    return f"pip install 'pagellm[{extra}]'{also}"


def another_run() -> str:
    """The option that gives a run another name."""
    return "RUN=another" if in_checkout() else "--run another"


def other_runs(run: Path) -> str:
    """A line that names the runs that are there, if `run` is not: --dataset was forgotten, say."""
    if any(run.parent.glob("*/config.json")):  # `run` is within another run
        return ""
    return others(run, "*/config.json", "--dataset or --run")


def other_data(data_set: Path) -> str:
    """A line that names the prepared data sets that are there, if this one is not."""
    return others(data_set, "source.json", "--dataset")


def others(path: Path, mark: str, option: str) -> str:
    """A line with the directories beside `path` that hold a file `mark`; "" if path is there.

    Begins with a line break. At most eight are named.
    """
    if path.exists() or not path.parent.is_dir():
        return ""
    names = sorted({p.relative_to(path.parent).parts[0] for p in path.parent.glob(f"*/{mark}")})
    few = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"\n  In {path.parent} there are: {few}. Name one with {option}." if names else ""
