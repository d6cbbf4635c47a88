"""Write the pages of the reference that are read off the source, in docs/reference.

    python docs/generate.py             write them
    python docs/generate.py --check     write nothing; end with 1 if a page is out of date

stages.md   every option of every command: name, type, default, meaning. They are read from the
            `Config` dataclasses and the comments on their lines.
modules.md  the first paragraph of every module's docstring.

Needs the base packages only.
"""

import ast
import dataclasses
import difflib
import html
import importlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pagellm.__main__ import VERBS  # noqa: E402
from pagellm.stage.config import field_comments  # noqa: E402

PAGES = ROOT / "docs" / "reference"
PACKAGES = ("kernels", "pagellm", "experiments")
NOTE = "<!-- Written by docs/generate.py. Do not edit: change the source and run `make docs`. -->"


def sources() -> list[Path]:
    """Every Python file of the three packages, in a fixed order."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def configs() -> dict[str, type]:
    """Module -> its `Config`: commands in the order of `pagellm --help`, then studies by name."""
    commands = {module: importlib.import_module(module).Config for module in VERBS.values()}
    rest = {}
    for path in sources():
        if re.search(r"^class Config\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            cls = importlib.import_module(module_of(path)).Config
            if cls not in commands.values():  # some commands keep their Config in another file
                rest[module_of(path)] = cls
    return commands | rest


def owners(cls: type) -> list[type]:
    """The class and its dataclass parents, nearest first."""
    return [c for c in cls.__mro__ if dataclasses.is_dataclass(c)]


def own_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that this class itself declares."""
    own = inspect.get_annotations(cls)
    return [f for f in dataclasses.fields(cls) if f.name in own]


def cell(text: str) -> str:
    """Text that may stand in a table of Markdown."""
    return re.sub(r"([|*_])", r"\\\1", html.escape(text, quote=False))


def option_table(cls: type, fields: list[dataclasses.Field]) -> list[str]:
    """A row for each of these fields of a Config."""
    comments = field_comments(cls)
    known_as = {field: name for name, field in getattr(cls, "ALIASES", {}).items()}
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for f in fields:
        kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
        default = "empty" if f.default == "" else f"`{f.default}`"
        name = known_as.get(f.name, f.name)
        lines.append(f"| `--{name}` | {kind} | {default} | {cell(comments.get(f.name, ''))} |")
    return lines


def said(cls: type) -> str:
    """The class's docstring, safe in Markdown."""
    return html.escape(inspect.cleandoc(cls.__doc__ or ""), quote=False)


def anchor(title: str) -> str:
    """The name by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def title_of(cls: type, among: list[type]) -> str:
    """The heading of a class whose options are shared; two of one name also name their folder."""
    alike = [other for other in among if other.__name__ == cls.__name__]
    return cls.__name__ if len(alike) == 1 else f"{cls.__name__} of {cls.__module__.split('.')[1]}"


def beside(above: list[type], among: list[type]) -> list[str]:
    """The line that says whose options come on top: those that are no parents of others here."""
    nearest = [p for p in above if not any(p in owners(other)[1:] for other in above)]
    titles = [title_of(p, among) for p in nearest]
    names = " and ".join(f"[{title}](#{anchor(title)})" for title in titles)
    return [f"Beside those of {names}:", ""] if nearest else []


def stages_page() -> str:
    """The page of all options."""
    found = configs()
    verb_of = {module: verb for verb, module in VERBS.items()}
    users: dict[type, int] = {}
    for cls in found.values():
        for parent in owners(cls)[1:]:
            users[parent] = users.get(parent, 0) + 1
    shared = sorted(
        (cls for cls, count in users.items() if count > 1), key=lambda cls: len(owners(cls))
    )
    lines = [
        NOTE,
        "",
        "# Options of every command",
        "",
        "Write an option as `--name value` or `--name=value`. A switch is `--name` or `--no-name`.",
        "`pagellm <command> --help` prints the same text. An unknown option stops the command.",
        "",
        "## Options that several commands share",
        "",
    ]
    for cls in shared:
        above = [p for p in owners(cls)[1:] if p in shared]
        lines += [f"### {title_of(cls, shared)}", "", said(cls), ""]
        lines += beside(above, shared)
        lines += [*option_table(cls, own_fields(cls)), ""]
    part = ""
    for module, cls in found.items():
        heading = "Commands" if module in verb_of else "Studies and measurements"
        if heading != part:
            lines += [f"## {heading}", ""]
            part = heading
        title = f"pagellm {verb_of[module]}" if module in verb_of else f"python -m {module}"
        above = [p for p in owners(cls)[1:] if p in shared]
        inline = [p for p in owners(cls) if p not in shared]
        lines += [f"### {title}", "", said(cls), ""]
        lines += beside(above, shared)
        fields = [f for p in reversed(inline) for f in own_fields(p)]
        lines += [*option_table(cls, fields), ""]
    return "\n".join(lines).rstrip() + "\n"


def first_paragraph(path: Path) -> str:
    """The first paragraph of a module's docstring; empty if it has none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def modules_page() -> str:
    """The page of all modules, a table for each folder."""
    lines = [
        NOTE,
        "",
        "# Every module, in one line",
        "",
        "`make docs` builds the page of each module's functions from its docstrings.",
        "",
    ]
    folder = None
    for path in sources():
        line = first_paragraph(path)
        if not line:
            continue
        if path.parent != folder:
            folder = path.parent
            lines += [
                "",
                f"## {folder.relative_to(ROOT).as_posix()}/",
                "",
                "| module | what it is |",
                "|---|---|",
            ]
        lines.append(f"| `{path.name}` | {cell(line)} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def main(argv: list[str]) -> int:
    if argv not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    stale = False
    for name, text in (("stages.md", stages_page()), ("modules.md", modules_page())):
        path = PAGES / name
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before == text:
            continue
        if argv:
            stale = True
            difference = difflib.unified_diff(
                before.splitlines(), text.splitlines(), "committed", "source", n=0, lineterm=""
            )
            print(
                "\n".join(
                    [
                        f"docs/reference/{name} is out of date; run: python docs/generate.py",
                        *list(difference)[2:12],
                    ]
                ),
                file=sys.stderr,
            )
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/reference/{name}")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
