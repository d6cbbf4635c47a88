"""Messages of commands for those who call them from Python: options as keyword arguments.

"--k_core 'five': want a whole number"             k_core='five': want a whole number
"Leave --repeat out."                              Leave repeat=True out.
"Make it with: pagellm sft --dataset toys"         Make it with: pagellm.fit('toys', stages='sft')
"or say where with --raw."                         or say where with table.
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from pagellm.stage.order import STAGES

__all__ = ["in_python"]


# Options of `prepare` whose files Python's arguments name.
ARGUMENTS = {"raw": "table", "review_files": "table", "item_files": "items"}
# A value behind an option, where it is no word of the sentence: quoted, a number, several with
# commas, or one of these.
WORDS = "random|temporal|leave_one_out|given|none|another|auto|greedy|sft|ppo|compose"
VALUE = rf"'[^']*'|\"[^\"]*\"|-?\d+(?:\.\d+)?(?:e-?\d+)?\b|\w+(?:,\w+)+|(?:{WORDS})\b"
OPTION = re.compile(rf"(?<![\w-])--(no-)?([a-z]\w*)(?:[ =]({VALUE}))?")
# A whole command: `make` with its target and its variables, `pagellm` with its verb and options.
WITH = r"(?: (?:--\w+(?:[ =][^-\s]\S*)?|[A-Z]+=\S+))"
COMMAND = re.compile(rf"(?<!`)\b(?:make [a-z][\w-]*{WITH}+|pagellm [a-z][\w-]*{WITH}*)(?<![,.;:)])")
HINT = re.compile(r" ?\[(?:--raw |RAW=)directory of the raw files\]")
ANOTHER = re.compile(r"\bRUN=(\w+)")


def in_python(text: str, kinds: Mapping[str, Any]) -> str:
    """A command's message in the words of a caller from Python.

    kinds  name of each option -> its type, as a type or by its name
    """
    kept: list[str] = []  # commands, which are not read again as options

    def keep(found: re.Match) -> str:
        kept.append(call(found[0]))
        return f"\0{len(kept) - 1}\0"

    text = COMMAND.sub(keep, HINT.sub("", text))
    text = ANOTHER.sub(r"run='\1'", text)

    def argument(found: re.Match) -> str:
        no, name, value = found.groups()
        shown = ARGUMENTS.get(name, name)
        if no:
            return f"{shown}=False"
        if value is None:
            return f"{shown}=True" if kinds.get(name) in (bool, "bool") else shown
        bare = value[0] in "'\"" or kinds.get(name, float) not in (str, "str")
        bare = bare and (value[0] in "'\"" or value[-1].isdigit())
        return f"{shown}={value}" if bare else f"{shown}={value!r}"

    return re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], OPTION.sub(argument, text))


def call(command: str) -> str:
    """A command as the call of Python that does the same; one that has none stays as it is."""
    first, verb, *words = shlex.split(command)
    given: dict[str, str] = {}
    while words:
        name, equals, value = words.pop(0).removeprefix("--").partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "True"
        given[name.lower()] = value
    dataset = given.pop("dataset", "synthetic")
    more = "".join(f", {name}={value!r}" for name, value in given.items())
    if verb == "prepare":
        return f"pagellm.prepare(table, dataset={dataset!r}{more})"
    if verb in STAGES:
        return f"pagellm.fit({dataset!r}, stages={verb!r}{more})"
    return command if first == "pagellm" else as_typed(verb, dataset, given)


def as_typed(verb: str, dataset: str, given: Mapping[str, str]) -> str:
    """A target of make as the command that does the same."""
    options = {"dataset": dataset, **given}
    return " ".join([f"pagellm {verb}", *(f"--{n} {shlex.quote(v)}" for n, v in options.items())])
