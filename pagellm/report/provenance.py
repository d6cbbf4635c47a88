"""Sections of the report: where the data come from; each stage's options, versions, minutes."""

from pagellm.report.findings import STAGES, Found, Missing
from pagellm.report.html import Html, esc, table, text
from pagellm.report.options import Config
from pagellm.stage import hints
from pagellm.stage.run import commit

__all__ = ["data_card", "provenance"]


def data_card(found: Found, config: Config) -> str:
    if not found.source:
        raise Missing(f"no source.json of {found.dataset}", hints.command("prepare", found.dataset))
    s, counts = found.source, found.source.get("counts", {})
    plain = [
        [name, f"{value:,}" if isinstance(value, int) else value]
        for name, value in sorted(counts.items())
        if isinstance(value, int | float | str)
    ]
    out = table(
        [f"data set {found.dataset}", "count"], [["release", s.get("release", "unknown")], *plain]
    )
    if counts.get("rows"):
        out += table(
            ["split", "positive rows", "other rows"],
            [[n, f"{v['positive']:,}", f"{v['other']:,}"] for n, v in counts["rows"].items()],
        )
    if counts.get("k_core"):
        steps = counts["k_core"]
        out += text(
            f"k-core filter, {hints.counted(len(steps), 'round')}: from "
            f"{hints.counted(steps[0]['users'], 'user')}, "
            f"{hints.counted(steps[0]['items'], 'item')}, "
            f"{hints.counted(steps[0]['rows'], 'row')} to {steps[-1]['users']:,}, "
            f"{steps[-1]['items']:,}, {steps[-1]['rows']:,}."
        )
    if read := s.get("read"):
        said = read.get("lines", []) + [f"Warning: {w}" for w in read.get("warnings", [])]
        out += table(["what was read, and how"], [[line] for line in said]) if said else ""
    if s.get("missing"):
        out += table(
            ["field", "share missing"], [[n, f"{v:.1%}"] for n, v in sorted(s["missing"].items())]
        )
    if s.get("files"):
        out += table(
            ["file", "role", "bytes", "SHA-256"],
            [
                [
                    f["name"],
                    f.get("role", ""),
                    f"{f['bytes']:,}",
                    Html(f"<code>{esc(f['sha256'])}</code>"),
                ]
                for f in s["files"]
            ],
        )
    else:
        out += text(
            "No raw files: the data set is made from its seed."
            if s.get("release") == "synthetic"
            else "No raw files are recorded."
        )
    return out + options("options of prepare", s.get("config", {}))


def options(name: str, config: dict) -> str:
    rows = [[k, Html(f"<code>{esc(repr(v))}</code>")] for k, v in sorted(config.items())]
    return f"<details><summary>{esc(name)}</summary>{table(['option', 'value'], rows)}</details>"


def provenance(found: Found, config: Config) -> str:
    rows, opened = [], []
    for name in STAGES:
        stage = found.stages[name]
        if not stage.recorded:
            rows.append(
                [name, Html(f'<td colspan="5">missing: <code>{esc(stage.command)}</code></td>')]
            )
            continue
        v = stage.recorded.get("versions", {})
        seconds = stage.done.get("seconds")
        rows.append(
            [
                name,
                str(stage.path),
                "not finished" if seconds is None else f"{seconds / 60:.1f}",
                stage.done.get("id") or "–",
                ", ".join(f"{k} {v[k]}" for k in sorted(v) if k not in ("machine", "commit")),
                v.get("machine", "unknown"),
            ]
        )
        opened.append(options(f"options of {name}", stage.recorded["config"]))
    recorded = {s.recorded.get("versions", {}).get("commit") for s in found.stages.values()} - {
        None
    }
    began = ", ".join(sorted(recorded)) or "unknown"
    total = sum(s.done.get("seconds", 0) for s in found.stages.values()) / 60
    notes = "".join(f'<p class="missing">{esc(note)}</p>' for note in found.notes)
    return (
        table(
            ["stage", "directory", "minutes", "weights", "versions", "machine"],
            rows,
            "minutes: the stage's last start to its end; one that was interrupted took longer",
        )
        + text(
            f"{total:.1f} minutes in all; commit of the run: {began}; report made by commit "
            f"{commit() or 'unknown'}."
        )
        + notes
        + "".join(opened)
    )
