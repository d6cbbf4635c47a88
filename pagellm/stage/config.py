"""Errors that a person can mend, and command lines made from dataclasses.

A stage has one frozen dataclass, `Config`. The comment at the end of a field's line is its help text,
so that the source and `--help` cannot drift apart:

    clip: float = 0.2        # epsilon of the clipped objective, arXiv 1707.06347 eq. 7
"""

import dataclasses
import difflib
import inspect
import io
import math
import shlex
import textwrap
import tokenize

__all__ = [
    "Options",
    "PageLLMError",
    "check",
    "check_numbers",
    "field_comments",
    "help_text",
    "parse",
]


class PageLLMError(Exception):
    """Something the reader can put right: printed without a traceback, exit code 2.

    The message says what happened, what was looked at, and what to do next.
    """


class Options(str):
    """A field that holds the options of another stage, as on its command line: --sft="--lr 0.1 --epochs 2".

    Given again it adds to what it had, so that a preset may come first: --sft=@pagellm/presets/toys/sft --sft="--lr 0.1".
    """


def check(config, **rules: tuple[bool, str]) -> None:
    """Raise for the first broken rule: check(self, clip=(0 < self.clip < 1, "between 0 and 1"))."""
    for field, (holds, wanted) in rules.items():
        if not holds:
            raise PageLLMError(f"{field}={getattr(config, field)!r}: want {wanted}")


def check_numbers(config, negative: tuple[str, ...] = (), infinite: tuple[str, ...] = ()) -> None:
    """Raise for a number below 0 (fields in `negative` may be) or not finite (fields in `infinite` may be)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        check(config, **{f.name: (f.name in infinite or math.isfinite(value), "a finite number")})
        check(config, **{f.name: (f.name in negative or value >= 0, "0 or more")})


def field_comments(cls) -> dict[str, str]:
    """Field name -> the comment on its line and on comment-only lines right under it; parents first."""
    comments: dict[str, str] = {}
    for parent in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        comments.update(own_comments(parent))
    return comments


def own_comments(cls) -> dict[str, str]:
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
    """The whole --help page: what the stage does, then every field with default, unit and meaning."""
    comments = field_comments(cls)
    lines = [
        f"usage: {prog} [--field value ...]",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        "fields:",
    ]
    for f in dataclasses.fields(cls):
        default = '""' if f.default == "" else f.default
        head = f"  --{f.name} {f.type.__name__ if isinstance(f.type, type) else f.type}"
        body = f"{comments.get(f.name, '')} (default {default})".strip()
        lines.append(head)
        lines += textwrap.wrap(body, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines += ["  --help", " " * 8 + "print this page"]
    return "\n".join(lines)


def read_value(field: dataclasses.Field, text: str):
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


def parse(cls, argv: list[str], prog: str = "pagellm"):
    """argv -> an instance of the dataclass `cls`. Accepts --name value, --name=value, --flag, --no-flag, and @file: a
    preset, a text file of such options, which later presets and options on the command line override.

    Raises PageLLMError for an option that is unknown (naming the nearest), repeated, without a value, or wrong.
    """
    presets = [word[1:] for word in argv if word.startswith("@")]
    values, preset = options(cls, [word for word in argv if not word.startswith("@")], prog), {}
    for path in presets:
        try:
            with open(path, encoding="utf-8") as file:
                words = shlex.split(file.read(), comments=True)
        except (OSError, ValueError) as error:
            raise PageLLMError(f"preset {path} cannot be read: {error}") from None
        preset |= options(cls, words, f"{prog}: preset {path}")
    return cls(**preset | values)


def options(cls, argv: list[str], prog: str) -> dict[str, object]:
    """Field -> value of the options in argv."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise PageLLMError(f"unexpected {word!r}; options look like --name value (see --help)")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        negated = (
            name.startswith("no_")
            and name[3:] in fields
            and fields[name[3:]].type in (bool, "bool")
        )
        if negated:
            name = name[3:]
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean --{near[0]}?" if near else f"see {prog} --help"
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
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise PageLLMError(f"--{name} needs a value")
            text = rest.pop(0)
        value = read_value(fields[name], text)
        values[name] = value if earlier is None else Options(f"{earlier} {value}")
    return values
