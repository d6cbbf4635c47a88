"""Show one run as one HTML file: results, learning curves, example pages, options and versions.

Reads   runs/<run>/*, data/<dataset>, and studies and baselines below runs/
Writes  runs/<run>/report.html      self-contained: no script, no request; light and dark

    make report [RUN=...]           pagellm report --run synthetic

It opens with one sentence and three figures. Trains nothing. Where a stage is missing, the report
names the command that makes it. The same files give the same bytes.
"""

import sys
from functools import partial
from pathlib import Path

from pagellm.report.findings import Found, read
from pagellm.report.html import esc, or_missing
from pagellm.report.options import Config
from pagellm.report.overview import opening
from pagellm.report.sections import SECTIONS
from pagellm.stage.command import main
from pagellm.stage.files import atomic
from pagellm.stage.hints import counted
from pagellm.stage.outputs import check_file

__all__ = ["Config", "build", "run"]


def build(found: Found, config: Config) -> str:
    """The report as one HTML page."""
    parts = []
    for name, (title, section) in SECTIONS.items():
        parts.append(
            f'<section id="{name}"><h2>{esc(title)}</h2>'
            + or_missing(partial(section, found, config))
            + "</section>"
        )
    size = (
        f"{counted(found.shop.n_users, 'user')}, {counted(found.shop.n_items, 'item')}"
        if found.shop
        else "no prepared data"
    )
    style = (Path(__file__).parent / "report.css").read_text()
    links = "".join(
        f'<li><a href="#{name}">{esc(title)}</a></li>'
        for name, (title, _) in list(SECTIONS.items())[1:]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{esc(found.run)}: PageLLM report</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><header><h1>{esc(found.run)}</h1>"
        f"<p class=quiet>Data set {esc(found.dataset)}: {size}; "
        f"{esc(found.split)} split, pages of {found.k}.</p>"
        f"<p class=lead>{esc(opening(found))}</p></header><main>{parts[0]}"
        f"<nav aria-label=Sections><ul>{links}</ul></nav>{''.join(parts[1:])}"
        "</main></body></html>\n"
    )


def is_report(path: Path) -> bool:
    """Whether a file is a report of this command."""
    with open(path, "rb") as file:
        return b": PageLLM report</title>" in file.read(4096)


def run(config: Config) -> Path:
    """Write the report and return its path."""
    name = config.run or config.dataset or "synthetic"
    path = Path(config.out) if config.out else Path(config.runs) / name / "report.html"
    check_file(path, is_report)
    page = build(read(config.runs, name, config.data, config.dataset), config)
    with atomic(path) as beside:
        beside.write_text(page, encoding="utf-8")
    print(f"report: {path}, {len(page.encode()) / 1e6:.1f} MB")
    return path


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm report"))
