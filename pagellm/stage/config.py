"""Errors that a person can correct, and command lines made from dataclasses.

Each command has one frozen dataclass, `Config`. Its fields are the command's options. The comment
at the end of a field's line is the option's help text, so source and `--help` always agree:

    clip: float = 0.2        # epsilon of the clipped objective, arXiv 1707.06347 eq. 7
"""

import dataclasses
import inspect
import io
import math
import os
import shlex
import textwrap
import tokenize
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path

from pagellm.stage import presets
from pagellm.stage.hints import nearest

__all__ = [
    "Options",
    "PageLLMError",
    "as_words",
    "check",
    "check_numbers",
    "field_comments",
    "help_text",
    "parse",
    "verb_of",
]


class PageLLMError(Exception):
    """An error that the user can correct. It is printed without a traceback and gives exit code 2.

    The message says what happened, what was looked at, and what to do next.
    """


class Options(str):
    """A field that holds the options of another stage: --sft="--lr 0.1 --epochs 2".

    Given again, it adds to what it had. A preset of the data set comes first: "@toys/sft --lr 0.1".
    """


def check(config, **rules: tuple[bool, str]) -> None:
    """Raise PageLLMError for the first rule that does not hold.

    rules  field -> (whether it holds, what is wanted):
           check(self, clip=(0 < self.clip < 1, "between 0 and 1"))
    """
    for field, (holds, wanted) in rules.items():
        if not holds:
            raise PageLLMError(f"{field}={getattr(config, field)!r}: want {wanted}")


def check_numbers(config, negative: tuple[str, ...] = (), infinite: tuple[str, ...] = ()) -> None:
    """Raise PageLLMError for a field that holds a number below 0, infinity or NaN.

    negative  fields that may be below 0      infinite  fields that may be infinite
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        check(config, **{f.name: (f.name in infinite or math.isfinite(value), "a finite number")})
        check(config, **{f.name: (f.name in negative or value >= 0, "0 or more")})


def field_comments(cls) -> dict[str, str]:
    """Field name -> its comment, of a dataclass and its parents.

    A field's comment stands after # on its line, and on the lines under it that hold nothing else.
    """
    comments: dict[str, str] = {}
    for parent in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        comments.update(own_comments(parent))
    return comments


def own_comments(cls) -> dict[str, str]:
    """`field_comments` of the fields that this class itself declares, read from its source."""
    source = textwrap.dedent(inspect.getsource(cls))
    names = [f.name for f in dataclasses.fields(cls)]
    comments: dict[str, str] = {}
    current, line_start = None, True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            line_start = True
        elif token.type == tokenize.COMMENT:
            if current:
                text = token.string.lstrip("#").strip()
                comments[current] = f"{comments[current]} {text}" if current in comments else text
        elif line_start:
            current = (
                token.string if token.type == tokenize.NAME and token.string in names else None
            )
            line_start = False
    return comments


def help_text(cls, prog: str) -> str:
    """The text of --help: what the command does, then type, meaning and default of every option."""
    comments = field_comments(cls)
    bare = "".join(f" {name.upper()}" for name in getattr(cls, "POSITIONAL", ()))
    lines = [
        f"usage: {prog}{bare} [--option value ...]",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        "options:",
    ]
    known_as = {field: name for name, field in getattr(cls, "ALIASES", {}).items()}
    for f in dataclasses.fields(cls):
        default = '""' if f.default == "" else f.default
        kind = f.type.__name__ if isinstance(f.type, type) else f.type
        head = f"  --{known_as.get(f.name, f.name)} {kind}"
        body = f"{comments.get(f.name, '')} (default {default})".strip()
        lines.append(head)
        lines += textwrap.wrap(body, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines += ["  --help", " " * 8 + "print this page", "", *other_places(cls, prog)]
    return "\n".join(lines).rstrip()


def other_places(cls, prog: str) -> list[str]:
    """Lines of --help: where options may stand apart from the command line."""
    verb = verb_of(prog)
    lines = [
        "options may also stand in a file; the command line overrides both kinds:",
        "  @FILE                text: --name value ...",
        f"  --config FILE.toml   the table [{verb}]; {', '.join(COMMON)} may stand",
        "                       above all tables",
    ]
    if prefix := getattr(cls, "ENVIRONMENT", ""):
        example = dataclasses.fields(cls)[0].name.upper()
        lines += [
            f"or in the environment, which overrides files: {prefix}{example}, and so on for each "
            "option"
        ]
    return lines


def read_value(field: dataclasses.Field, text: str):
    """The value of a field from its text. Raises PageLLMError if it is not of the field's type."""
    kind = (
        field.type
        if isinstance(field.type, type)
        else {"int": int, "float": float, "bool": bool, "str": str, "Options": Options}[field.type]
    )
    if kind is bool:
        lowered = text.lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise PageLLMError(f"--{field.name} {text!r}: want true or false")
    try:
        value = kind(text)
    except ValueError:
        wanted = {"int": "a whole number", "float": "a number"}[kind.__name__]
        raise PageLLMError(f"--{field.name} {text!r}: want {wanted}") from None
    if kind is float and math.isnan(value):
        raise PageLLMError(f"--{field.name} {text!r}: want a number")
    return value


def parse(
    cls,
    argv: list[str],
    prog: str = "pagellm",
    verb: str = "",
    tell: Callable[[str], None] = lambda line: None,
):
    """argv -> an instance of the dataclass `cls`.

    Bare words are the values of the fields that cls.POSITIONAL names, in order, if it has that
    attribute: `pagellm promote v2` is `pagellm promote --run v2`. cls.ALIASES is option -> field,
    for an option that goes by another name than its field: --from, which is a word of Python.

    Accepts --name value, --name=value, --flag, --no-flag; @preset, a text file of such options; and
    --config FILE, a TOML file with one table a command. A later file overrides an earlier one. The
    environment overrides files, for a class with the attribute ENVIRONMENT (`from_environment`).
    Options on the command line override all of these.

    verb  name of the command whose preset of the data set is to be taken (`with_presets`);
          empty: none is. Only a class with the fields `preset` and `dataset` has any
    tell  is called with one line for each preset that was found

    Raises PageLLMError for an option that is unknown (and names the nearest), repeated, without a
    value, or wrong.
    """
    words, files = apart(cls, argv)
    typed = options(cls, words, prog)
    given: dict[str, object] = {}
    for kind, name in files:
        if kind == "@":
            given |= preset_options(cls, name, prog)
        else:
            given |= from_toml(cls, name, verb_of(prog), prog)
    given |= from_environment(cls, os.environ, tell, set(typed))
    given |= typed
    given = as_names(cls, given)
    if verb and "preset" in {f.name for f in dataclasses.fields(cls)}:
        given = with_presets(cls, given, prog, verb, tell)
    return cls(**given)


def as_names(cls, given: dict[str, object]) -> dict[str, object]:
    """The options, with runs and data sets by name where their directory was given.

    A shell completes runs/autumn/, where --run takes autumn.
    """
    known = {f.name: f.default for f in dataclasses.fields(cls)}
    own = getattr(cls, "POSITIONAL", ())
    found = dict(given)
    for name, value in given.items():
        is_run = "runs" in known and (name == "live" or name.endswith("run") or name in own)
        home = "runs" if is_run else "data" if name == "dataset" and "data" in known else ""
        if not home or not isinstance(value, str) or "/" not in value:
            continue
        folder = Path(str(given.get(home, known[home]))).absolute()
        path = Path(os.path.normpath(Path(value).absolute()))
        inside = Path(os.path.normpath(folder)) in path.parents
        found[name] = str(path.relative_to(os.path.normpath(folder))) if inside else value
        found[name] = str(found[name]).rstrip("/")
    return found


def verb_of(prog: str) -> str:
    """The name of a command, under which presets and tables of --config know it.

    "sft" of "pagellm sft", "storefront-page" of "pagellm storefront page", "ablation" of
    "experiments.ablation"
    """
    first, *rest = prog.split()
    return "-".join(rest) or first.rpartition(".")[2]


def apart(cls, argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Words of the command line without the files of options; the files as (kind, name).

    A word that begins with @ names a preset, unless it is the value of the option before it:
    `--exclude @ids.txt`.

    kind  "@" for a preset, "toml" for a file of --config
    """
    positions = list(getattr(cls, "POSITIONAL", ()))
    takes_value = {"--" + f.name for f in dataclasses.fields(cls) if f.type not in (bool, "bool")}
    takes_value |= {"--" + name for name in getattr(cls, "ALIASES", {})}
    words: list[str] = []
    files: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if "--" + word[2:].replace("-", "_") in takes_value and word.startswith("--") and rest:
            words.append(word)
            if not rest[0].startswith("--"):
                words.append(rest.pop(0))
        elif word.startswith("@"):
            files.append(("@", word[1:]))
        elif name == "--config":
            if not equals and (not rest or rest[0].startswith("--")):
                raise PageLLMError("--config needs a TOML file")
            files.append(("toml", value if equals else rest.pop(0)))
        elif positions and not word.startswith("-"):
            words.append(f"--{positions.pop(0)}={word}")
        else:
            words.append(word)
    return words, files


# Options that may stand above all tables of a TOML file: most commands have them.
COMMON = ("dataset", "run", "data", "runs", "seed", "device")


def from_toml(cls, name: str, verb: str, prog: str) -> dict[str, object]:
    """Field -> value, from the table [verb] of a TOML file and from its common options.

    Other commands' tables are passed over, so one file can hold all of a shop's options. Raises
    PageLLMError for a file that cannot be read, and for an option that is unknown or wrong.
    """
    try:
        content = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PageLLMError(f"--config {name} cannot be read: {error}") from None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    common = {k: v for k, v in content.items() if not isinstance(v, dict)}
    table = content.get(verb, {})
    if strange := sorted(set(common) - set(COMMON)):
        raise PageLLMError(
            f"--config {name}: {strange[0]} stands above all tables, where only "
            f"{', '.join(COMMON)} may; put it into the table of its command, such as [{verb}]"
        )
    near = nearest(verb, content, 0.7)
    if verb not in content and near:
        raise PageLLMError(f"--config {name}: no table [{verb}]; did you mean it by [{near}]?")
    words = []
    for key, value in ({k: v for k, v in common.items() if k in fields} | table).items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict):
            raise PageLLMError(f"--config {name}: [{verb}.{key}] is a table, want one value")
        words.append(f"--{key}={value}")
    try:
        return options(cls, words, prog)
    except PageLLMError as error:
        raise PageLLMError(f"--config {name}: {error}") from None


def from_environment(
    cls, environment, tell: Callable[[str], None], typed: Collection[str] = ()
) -> dict[str, object]:
    """Field -> value, from variables such as PAGELLM_PORT; nothing unless cls.ENVIRONMENT is set.

    cls.ENVIRONMENT  what the variables' names begin with: "PAGELLM_". An empty variable counts as
                     not set
    cls.SECRET       fields whose values are never shown
    tell             is called with the variables that were taken, and with those that look mistyped
    typed            fields that the command line has given: their variables are passed over
    """
    prefix = getattr(cls, "ENVIRONMENT", "")
    if not prefix:
        return {}
    fields = {prefix + f.name.upper(): f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for name in sorted(n for n in environment if n.startswith(prefix) and environment[n]):
        field = fields.get(name)
        if field is None:
            near = nearest(name, fields, 0.85)
            if near:
                tell(f"environment: {name} is no option of this command; {near} is")
            continue
        if field.name in typed:
            continue
        secret = field.name in getattr(cls, "SECRET", ())
        try:
            values[field.name] = read_value(field, environment[name])
        except PageLLMError as error:
            raise PageLLMError(f"{name} of the environment: {error}") from None
        tell(f"environment: {name}={'...' if secret else environment[name]}")
    return values


def with_presets(cls, given: dict, prog: str, verb: str, tell: Callable[[str], None]) -> dict:
    """The options given, and below them those of the data set's presets.

    Field `preset` says which preset is taken: "auto", the run's or else the data set's for this
    command, if there is one; "none"; or another one, by its path or name. Afterwards it holds the
    name of the one taken. Unless it is "none":

    - A field of type Options holds the options of another stage. It begins with that stage's
      preset: --sft "--lr 0.1" becomes "@toys/sft --lr 0.1". The preset is looked up in the data
      set's folder cls.PRESET_FOLDER, if cls has that attribute.
    - cls.PRESET_YIELDS is field -> fields whose value in the preset is dropped where it was given.
    - cls.PRESET_FILES is field -> file name. Such a field takes the name of the data set's file,
      unless it was given; "none" leaves it empty.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    which = given.get("preset", fields["preset"].default)
    dataset = given.get("dataset", fields["dataset"].default)
    files = getattr(cls, "PRESET_FILES", {})
    given = {k: "" if k in files and v == "none" else v for k, v in given.items()}
    if which == "none":
        return given
    found = presets.find(dataset, verb, run=run_of(fields, given, dataset))
    if name := found if which == "auto" else which:
        taken = preset_options(cls, name, prog)
        if fixed := {"dataset", "preset"} & set(taken):
            raise PageLLMError(f"preset {name} must not set {', '.join(sorted(fixed))}")
        yielded = getattr(cls, "PRESET_YIELDS", {})
        for field in [f for f in yielded if given.get(f)]:
            taken = {k: v for k, v in taken.items() if k not in yielded[field]}
        kept = {k: v for k, v in taken.items() if k not in given}
        tell(f"preset {name}: {as_words(kept) or 'every option of it was given'}")
        given = taken | given | {"preset": name}
    folder = [cls.PRESET_FOLDER] if hasattr(cls, "PRESET_FOLDER") else []
    for field in [f.name for f in fields.values() if f.type in (Options, "Options")]:
        if found := presets.find(dataset, *folder, field):
            given[field] = Options(f"@{shlex.quote(found)} {given.get(field, '')}".rstrip())
            tell(f"preset {found}: --{field} {shlex.quote(shlex.join(words_of(found)))}")
    for field, file in files.items():
        if field not in given and (found := presets.find(dataset, file)):
            given[field] = found
            tell(f"preset {found}: --{field} {found}")
    return given


def run_of(fields: dict[str, dataclasses.Field], given: dict, dataset: str) -> Path | None:
    """The directory of the run that these options name; None for a command without runs."""
    if not {"runs", "run"} <= fields.keys():
        return None
    runs, run = (given.get(name, fields[name].default) for name in ("runs", "run"))
    return Path(runs) / (run or dataset)


def preset_options(cls, name: str, prog: str) -> dict[str, object]:
    """Field -> value, for each option of a preset. Raises PageLLMError as `parse` does."""
    words = words_of(name)
    try:
        return options(cls, words, prog)
    except PageLLMError as error:
        raise PageLLMError(f"preset {name}: {error}{as_toml(name)}") from None


def as_toml(name: str) -> str:
    """A line that says how a TOML file is given; "" for a preset of another name.

    Begins with a line break.
    """
    there = f"--config {shlex.quote(name)}"
    return f"\n  A TOML file is given as {there}" if name.lower().endswith(".toml") else ""


def words_of(name: str) -> list[str]:
    """The words of a preset, comments left out. name: its path, or its name in the package."""
    try:
        return shlex.split(presets.resolve(name).read_text(encoding="utf-8"), comments=True)
    except (OSError, ValueError) as error:
        raise PageLLMError(f"preset {name} cannot be read: {error}{as_toml(name)}") from None


def as_words(values: dict[str, object]) -> str:
    """Options as they stand on a command line."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def is_option(word: str) -> bool:
    """Whether a word of the command line begins as an option does; `--` alone does not."""
    return word.startswith("--") and len(word) > 2


def holds_options(field: dataclasses.Field, word: str) -> bool:
    """Whether a word that begins with -- is the value of a field of type Options.

    It is if the shell kept several words in it, or an option with its value: `--prepare
    "--item_column sku"`, `--prepare --split=time`.
    """
    return field.type in (Options, "Options") and (" " in word or "=" in word)


def options(cls, argv: list[str], prog: str) -> dict[str, object]:
    """Field -> value, for each option in argv. Raises PageLLMError as `parse` does."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise PageLLMError(f"unexpected {word!r}; options look like --name value (see --help)")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        name = getattr(cls, "ALIASES", {}).get(name, name)
        negated = (
            name.startswith("no_")
            and name[3:] in fields
            and fields[name[3:]].type in (bool, "bool")
        )
        if negated:
            name = name[3:]
        if name not in fields:
            near = nearest(name, fields, 0.5)
            hint = f"did you mean --{near}?" if near else f"see {prog} --help"
            raise PageLLMError(f"no option --{word[2:].partition('=')[0]}; {hint}")
        earlier = values.get(name)
        if earlier is not None and not isinstance(earlier, Options):
            raise PageLLMError(f"--{name} is given twice")
        is_bool = fields[name].type in (bool, "bool")
        if negated:
            values[name] = False
            continue
        if not equals:
            if is_bool and (not rest or rest[0].startswith("--")):
                values[name] = True
                continue
            if not rest or (is_option(rest[0]) and not holds_options(fields[name], rest[0])):
                raise PageLLMError(f"--{name} needs a value")
            text = rest.pop(0)
        value = read_value(fields[name], text)
        values[name] = value if earlier is None else Options(f"{earlier} {value}")
    return values
