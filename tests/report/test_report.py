"""The report is complete, equals metrics.json, needs no network, escapes text, names gaps."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagellm import evaluate
from pagellm.baselines import compare
from pagellm.pages.ranked import RankedPages
from pagellm.pages.tables import write_table
from pagellm.report import (
    findings,
    html,
    measure,
    overview,
    pages,
    plots,
    report,
    sections,
)
from pagellm.serving.recommender import Ask
from pagellm.stage.config import PageLLMError

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = (
    "</script><script>alert('1')</script><img src=x onerror=\"a\"> $\\frac{1}{0}$ & \x00\n"
    "`{{7*7}}` http://evil.example/"
)


class Page(HTMLParser):
    """Parsed report. tags: (name, attributes) in order; sections: text; tables: rows of cells."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.sections, self.tables, self.css = [], [], {}, [], ""
        self.section, self.best = None, set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.sections[self.section] = ""
        elif tag == "table":
            self.tables.append((self.section, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
            if dict(attrs).get("class") == "best":
                self.best.add(
                    (self.tables[-1][1][-1][0].split()[0], len(self.tables[-1][1][-1]) - 1)
                )

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes what was not opened last"
        if tag == "section":
            self.section = None

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] += data
        if "style" in self.open:
            self.css += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][1][-1][-1] += data + " "


@pytest.fixture(scope="module")
def root(served, tmp_path_factory):
    """`served` with an evaluation, baselines, and two studies."""
    root = tmp_path_factory.mktemp("report") / "root"
    shutil.copytree(served, root)
    # another test of the session may have left one
    shutil.rmtree(root / "runs" / "base" / "evaluate", ignore_errors=True)
    common = {
        "run": "base",
        "data": str(root / "data"),
        "runs": str(root / "runs"),
        "device": "cpu",
    }
    evaluate.run(evaluate.Config(k=6, depth=40, n_boot=50, quiet=True, **common))
    compare.run(
        compare.Config(
            ranker="never",
            models="popularity,EASE",
            rerank="",
            trials=2,
            refit=True,
            k=6,
            depth=40,
            n_boot=50,
            **common,
        )
    )
    write_table(
        root / "runs" / "ablation" / "synthetic-table5.parquet",
        [
            {
                "variant": v,
                "metric": "ILD",
                "direction": "up",
                "seeds": 2,
                "mean": 0.5 + d,
                "sd_over_seeds": 0.01,
                "versus": "mixed",
                "difference": d,
                "low": d - 0.1,
                "high": d + 0.1,
            }
            for v, d in (("mixed", 0.0), ("item <only>", 0.0625))
        ],
    )
    write_table(
        root / "runs" / "coldstart" / "synthetic.parquet",
        [
            {
                "variant": v,
                "users": u,
                "count": 7,
                "metric": "NDCG@100",
                "full": 0.25,
                "thinned": 0.25 + d,
                "difference": d,
                "low": d - 0.1,
                "high": d + 0.1,
                "drop": -400 * d,
            }
            for v, d in (("EASE", -0.03125), ("PageLLM", -0.015625))
            for u in ("all", "0–4", "5+")
        ],
    )
    return root


def config(root, **more):
    return report.Config(
        **{
            "run": "base",
            "data": str(root / "data"),
            "runs": str(root / "runs"),
            "device": "cpu",
            "examples": 5,
            "judged": 30,
            "pairs": 40,
        }
        | more
    )


@pytest.fixture(scope="module")
def text(root):
    return report.run(config(root)).read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_every_section_is_there_and_has_content(page):
    assert list(page.sections) == list(sections.SECTIONS)
    for name, words in page.sections.items():
        assert "Missing" not in words, f"{name}: {words[:300]}"
        assert len(words) > 40 or name == "alarms", name
    assert not page.open
    inside = {name: 0 for name in page.sections}
    now = None
    for tag, attrs in page.tags:
        now = attrs["id"] if tag == "section" else now
        inside[now] = inside.get(now, 0) + (tag == "figure")
    for name, least in {
        "overview": 3,
        "results": 1,
        "learning": 12,
        "reward": 3,
        "truth": 2,
        "positions": 3,
        "popularity": 2,
        "history": 4,
        "energy": 2,
        "studies": 6,
    }.items():
        assert inside[name] >= least, f"{name}: {inside[name]} figures"


def test_every_figure_says_what_it_shows(page):
    pictures = [attrs for tag, attrs in page.tags if tag == "svg" or attrs.get("role") == "img"]
    assert len(pictures) > 35
    for attrs in pictures:
        assert (
            attrs["role"] == "img"
            and len(attrs["aria-label"]) > 20
            and re.search(r"\d", attrs["aria-label"])
        )
    assert sum(tag == "figure" for tag, _ in page.tags) == sum(
        tag == "figcaption" for tag, _ in page.tags
    )


def test_nothing_is_asked_of_the_network(page):
    for tag, attrs in page.tags:
        assert tag not in {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "image",
            "base",
            "form",
        }, tag
        for name, value in attrs.items():
            assert not name.startswith(("on", "xmlns", "xlink")), (tag, name)
            if name in ("href", "src", "srcset", "action"):
                assert value.startswith("#"), (tag, name, value)
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#"), (tag, name, value)
    assert page.css and "url(" not in page.css and "@import" not in page.css


def test_ids_are_unique_and_what_is_referred_to_exists(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {
        value[1:] for _, attrs in page.tags for name, value in attrs.items() if name == "href"
    }
    wanted |= {
        m
        for _, attrs in page.tags
        for v in attrs.values()
        for m in re.findall(r"url\(#([^)]*)\)", v or "")
    }
    assert wanted and wanted <= set(ids)


def test_light_and_dark(text, page):
    assert "prefers-color-scheme: dark" in page.css and "color-scheme: light dark" in page.css
    light, dark = page.css.split("prefers-color-scheme: dark", 1)
    drawing = "".join(text.split("<svg")[1:])
    used = set(re.findall(r"var\((--\w+)\)", drawing))
    assert {"--s0", "--s1", "--grid"} <= used and "currentColor" in drawing
    for name in used | {"--ink", "--paper"}:
        assert f"{name}:" in light and (f"{name}:" in dark or name == "--v"), name
    assert not re.search(r"(fill|stroke): ?#(?!fff)", drawing), "a colour that no theme can change"


def test_it_opens_with_a_sentence_and_three_figures(root, text, page):
    """Before any table; the sentence's numbers are those of metrics.json."""
    before = text[: text.index("<table")]
    assert before.count("<figure") >= 3 and before.index("class=lead") < before.index("<figure")
    lead = re.search(r"<p class=lead>(.*?)</p>", text)[1]
    run = root / "runs" / "base"
    stored = {
        **json.loads((run / "baselines" / "metrics.json").read_text()),
        **json.loads((run / "evaluate" / "metrics.json").read_text()),
    }
    change = stored.pop("PageLLM - SFT")
    best = max(scores["NDCG@100"]["mean"] for scores in stored.values())
    assert f"NDCG@100 {best:.4f}" in lead and f"best of {len(stored)} policies" in lead
    assert f"ILD {change['ILD']['mean']:+.4f}".replace("-", "−") in lead
    word = {"better": "more", "worse": "less"}.get(
        html.verdict("ILD", change["ILD"]["low"], change["ILD"]["high"]), "as"
    )
    assert f"pages {word} varied" in lead


@pytest.mark.parametrize(
    ("text", "em"),  # as wide as DejaVu Sans sets it
    [("NDCG@100 ↑", 7.06), ("WMRD ↓", 4.47), ("energy ↑", 4.64), ("PageLLM (composed)", 10.64)],
)
def test_labels_have_room_in_a_wide_font(text, em):
    assert 0.97 * em <= plots.width_of(text, 1.0) <= 1.1 * em


def test_one_policy_from_elsewhere_is_one(root):
    found = findings.read(str(root / "runs"), "base", str(root / "data"))
    found.results = {
        name: {"NDCG@100": {"mean": x, "low": x, "high": x, "count": 9}}
        for name, x in ((findings.SFT, 0.2), ("popularity", 0.1))
    }
    assert "Gray: 1 policy from elsewhere" in overview.who_wins(found)


def test_the_sentence_says_what_there_is(root):
    def told(results, *done):
        found = findings.read(str(root / "runs"), "base", str(root / "data"))
        for name, stage in found.stages.items():
            stage.done = {"id": "x"} if name in done else {}
        found.results = {
            name: {"NDCG@100": {"mean": x, "low": x, "high": x, "count": 9}}
            for name, x in results.items()
        }
        return overview.opening(found)

    sft, both = findings.SFT, {findings.SFT: 0.2, findings.COMPOSED: 0.3}
    assert "finished pretrain, sft; its pages have not been scored" in told({}, "pretrain", "sft")
    assert "SFT reaches NDCG@100 0.2000; no other policy" in told({sft: 0.2})
    assert "9 users, ALS ranks best of 2 policies (NDCG@100 0.5000)" in told({sft: 0.2, "ALS": 0.5})
    assert "own policies SFT comes closest (0.2000)" in told({sft: 0.2, "ALS": 0.5})
    assert "PageLLM (composed) ranks best of 2" in told(both) and "closest" not in told(both)


@given(st.dictionaries(st.integers(), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_what_is_off_the_frontier_is_beaten_by_what_is_on_it(points):
    edge = overview.frontier(points)
    assert edge and [points[n] for n in edge] == sorted(points[n] for n in edge)
    for name, (x, y) in points.items():
        above = [n for n in edge if points[n] >= (x, y) and points[n][1] >= y]
        assert (name in edge) == all(points[n] == (x, y) for n in above)


def said(heading, low, high):
    """First word of the report's verdict on a difference."""
    if low <= 0 <= high:
        return "equal" if low == high else "within"
    return "better" if (high < 0) == ("↓" in heading) else "worse"


def test_verdicts():
    for metric, arrow in (("ILD", "↑"), ("WMRD", "↓")):
        for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.0), (0.0, 0.1)):
            assert html.verdict(metric, low, high).split()[0] == said(arrow, low, high)


def test_numbers_are_those_of_metrics_json(root, page):
    stored = json.loads((root / "runs" / "base" / "evaluate" / "metrics.json").read_text())
    first, versus = [rows for section, rows in page.tables if section == "results"][:2]
    named = {evaluate.LABELS.get(name, name): scores for name, scores in stored.items()}
    head = [h.strip() for h in first[0]]
    assert head[1:] == [
        "EASE",
        "EASE, refit",
        "popularity",
        "popularity, refit",
        'SFT = "w/o reward"',
        "PageLLM",
    ]
    plain = json.loads((root / "runs" / "base" / "baselines" / "metrics.json").read_text())
    named = plain | named
    seen = 0
    for row in first[1:]:
        metric = row[0].split()[0]
        for name, cell in zip(head[1:], row[1:], strict=True):
            s = named[name][metric]
            assert cell.split() == [f"{s['mean']:.4f}", f"[{s['low']:.4f},", f"{s['high']:.4f}]"], (
                metric,
                name,
            )
            seen += 1
        best = (max if "↑" in row[0] else min)(named[name][metric]["mean"] for name in head[1:])
        same = len({named[name][metric]["mean"] for name in head[1:]}) == 1
        assert {at for m, at in page.best if m == metric} == {
            at
            for at, name in enumerate(head)
            if at and named[name][metric]["mean"] == best and not same
        }, metric
    assert seen >= 6 * 10
    at = [h.strip() for h in versus[0]].index('SFT = "w/o reward"')
    for row in versus[1:]:
        s = stored["PageLLM - SFT"][row[0].split()[0]]
        words = row[at].split()
        assert words[0] == f"{s['mean']:+.4f}" and words[-2:] == [
            f"[{s['low']:+.4f},",
            f"{s['high']:+.4f}]",
        ]
        assert words[1] == said(row[0], s["low"], s["high"])
    for other in ("popularity", "EASE"):  # everybody has a Recall@20, so means may be subtracted
        row = next(row for row in versus if row[0].startswith("Recall@20"))
        cell = row[[h.strip() for h in versus[0]].index(other)]
        want = stored["ppo"]["Recall@20"]["mean"] - named[other]["Recall@20"]["mean"]
        assert float(cell.split()[0]) == pytest.approx(want, abs=6e-5)


def test_reward_accuracy_and_options_are_those_on_disk(root, page):
    done = json.loads((root / "runs" / "base" / "reward" / "done").read_text())["held_out"]
    rows = next(rows for section, rows in page.tables if section == "reward")
    assert {row[0].strip(): row[2].strip() for row in rows[1:]} == {
        kind: f"{v['accuracy']:.4f}" for kind, v in done.items() if isinstance(v, dict)
    }
    words = page.sections["provenance"]
    made = [s for s in findings.STAGES if (root / "runs" / "base" / s / "done").exists()]
    assert {"pretrain", "sft", "reward", "ppo", "evaluate"} <= set(made)
    for stage in made:
        recorded = json.loads((root / "runs" / "base" / stage / "config.json").read_text())
        assert all(value is None or value in words for value in recorded["versions"].values())
        assert recorded["versions"].keys() > {"commit", "machine"} and all(
            o in words for o in recorded["config"]
        )
    words = page.sections["studies"]
    assert (
        "+0.0625" in words
        and "item <only>" in words
        and "-0.0156" in words
        and "0.2500 → 0.2188" in words
    )


def test_baselines_are_drawn_with_the_intervals_of_metrics_json(root, page):
    stored = json.loads((root / "runs" / "base" / "baselines" / "metrics.json").read_text())
    said = [
        attrs["aria-label"]
        for tag, attrs in page.tags
        if tag == "svg" and attrs["aria-label"].startswith("NDCG@100: ")
    ]
    assert len(said) == 1 and "PageLLM " in said[0]
    for name, scores in stored.items():
        v = scores["NDCG@100"]
        assert f"{name} {v['mean']:.4f} [{v['low']:.4f}, {v['high']:.4f}]" in said[0]


def test_examples_mark_exactly_the_hits(root, page):
    """Hits in the summary lines equal the marks on the pages and the held-out rows of the data."""
    found = findings.read(str(root / "runs"), "base", str(root / "data"))
    told = re.findall(
        r"user (\S+): held-out items found: (\d+) by [^,]*, (\d+) by ",
        page.sections["examples"],
    )
    assert len(told) == 5
    for name, *counts in told:
        user = found.shop.user_ids.index(name)
        held = set(found.scorer.held.of(user)[0].tolist())
        for policy, count in zip(("sft", "ppo"), counts, strict=True):
            pages = found.pages[policy]
            row = int(np.flatnonzero(pages.user == user)[0])
            assert int(count) == len(held & set(pages.item[row, : pages.slots[row]].tolist()))
    assert page.sections["examples"].count("Ground truth") == 5
    lists = [attrs for tag, attrs in page.tags if tag == "ol"]
    strips = [attrs["aria-label"] for tag, attrs in page.tags if attrs.get("class") == "strip"]
    assert len(lists) == len(strips) == 10
    marked = sum(label.count("✓") for label in strips)
    assert marked == sum(int(n) for _, *counts in told for n in counts)
    sums = re.findall(
        r"(\d+) exact, (\d+) same category, (\d+) same brand", page.sections["examples"]
    )
    assert len(sums) == 10
    assert [sum(map(int, column)) for column in zip(*sums, strict=True)] == [
        sum(label.count(mark) for label in strips) for mark in "✓≈◇"
    ]
    assert page.sections["examples"].count("<page>") == 5  # the prompts


def test_rewards_are_those_of_the_recommender(root, page, rec):
    """Token rewards in every strip equal Recommender.answers'; totals add the page's reward."""
    found = findings.read(str(root / "runs"), "base", str(root / "data"))
    judged = measure.sample_rewards(found, config(root), 30)
    strips = [attrs["aria-label"] for tag, attrs in page.tags if attrs.get("class") == "strip"]
    users = re.findall(r"user (\S+): \d+ held-out", page.sections["examples"])
    for at, name in enumerate(users):
        row = np.flatnonzero(judged.user == found.shop.user_ids.index(name))[0]
        for side, policy in enumerate(("sft", "ppo")):
            pages = found.pages[policy]
            own = np.flatnonzero(pages.user == judged.user[row])[0]
            ids = tuple(found.shop.catalogue.ids[i] for i in pages.item[own, : pages.slots[own]])
            (answer,) = rec.answers([Ask(user=name, policy="sft", page=ids)])
            token = [slot["token_reward"] for slot in answer["items"]]
            told = [float(x) for x in re.findall(r"\d+: (-?\d+\.\d\d)", strips[2 * at + side])]
            assert np.allclose(told, token, atol=0.006) and np.ptp(token) > 0
            assert judged.total[side, row] == pytest.approx(
                answer["page_reward"] + np.mean(token), abs=1e-4
            )


def test_relative_gains_point_right_where_pagellm_is_better(root, page):
    stored = json.loads((root / "runs" / "base" / "evaluate" / "metrics.json").read_text())
    label = next(
        a["aria-label"] for t, a in page.tags if t == "svg" and "percent of SFT" in a["aria-label"]
    )
    told = re.findall(r"(\S+) ([↑↓]) ([+-][\d.]+) \[", label)
    assert len(told) > 5 and {arrow for _, arrow, _ in told} == {"↑", "↓"}
    for metric, arrow, value in told:
        want = 100 * stored["PageLLM - SFT"][metric]["mean"] / abs(stored["sft"][metric]["mean"])
        assert float(value) == pytest.approx(want if arrow == "↑" else -want, abs=0.051), metric


def test_curves_are_the_log(root):
    stage = findings.read(str(root / "runs"), "base", str(root / "data")).stages["reward"]
    lines = [json.loads(line) for line in (stage.path / "log.jsonl").read_text().splitlines()]
    step, loss = stage.column("loss")
    assert step.tolist() == [row["step"] for row in lines] and loss.tolist() == [
        row["loss"] for row in lines
    ]
    with pytest.raises(findings.Missing):
        stage.need("nothing")
    stage.log[1]["loss"] = None
    stage.log[2]["loss"] = float("nan")
    assert len(stage.column("loss")[0]) == len(lines) - 2


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=700))
def test_thinned_curves_keep_mean_and_range(values):
    x, y = html.thin(np.arange(len(values)), np.array(values))
    assert len(x) == len(y) == min(len(values), html.POINTS)
    assert min(values) - 1e-9 <= y.min() and y.max() <= max(values) + 1e-9
    if len(values) % html.POINTS == 0:
        assert y.mean() == pytest.approx(np.mean(values), abs=1e-6)


@given(st.integers(2, 50), st.floats(-3, 3), st.floats(0.1, 3))
def test_bands(n, shift, scale):
    """band(shift + scale x) = shift + scale band(x); slots past a page's end do not count."""
    x = np.random.default_rng(n).normal(size=(n, 3))
    mean, low, high = pages.band(x)
    assert np.allclose(high - mean, 1.96 * x.std(0, ddof=1) / np.sqrt(n))
    assert np.allclose(
        pages.band(shift + scale * x), [shift + scale * v for v in (mean, low, high)]
    )
    assert np.allclose(pages.band(np.vstack([x, np.full((4, 3), np.nan)])), (mean, low, high))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any))
def test_gini(times):
    times = np.array(times)
    # half the relative mean difference
    pairs = np.abs(times[:, None] - times).mean() / (2 * times.mean())
    assert pages.gini(times) == pytest.approx(pairs, abs=1e-9)


def test_the_same_files_give_the_same_bytes(root, text):
    again = report.run(config(root, out=str(root / "again.html")))
    assert again.read_text() == text


def test_hostile_titles_stay_text(root):
    found = findings.read(str(root / "runs"), "base", str(root / "data"))
    c = found.shop.catalogue
    c.title[:] = [f"{EVIL}{i}" for i in range(len(c))]
    c.leaf[:] = [EVIL] * len(c)
    c.leaf_names[:] = [f"{i}{EVIL}" for i in range(len(c.leaf_names))]
    found.run = EVIL
    found.source["files"] = [{"name": EVIL, "role": EVIL, "bytes": 1, "sha256": EVIL}]
    found.studies = {
        EVIL: [
            r | {"variant": r["variant"] + EVIL, "versus": "mixed" + EVIL}
            for r in next(iter(found.studies.values()))
        ]
    }
    found.stages["ppo"].log[-1]["alarms"] = [EVIL]
    found.notes.append(EVIL)
    hostile = Page(report.build(found, config(root)))
    test_nothing_is_asked_of_the_network(hostile)
    assert not hostile.open and list(hostile.sections) == list(sections.SECTIONS)
    assert "</script><script>" in hostile.sections["popularity"]
    for section in ("examples", "studies", "data", "alarms", "provenance"):
        assert "<script>alert('1')" in hostile.sections[section], section  # shown as it is written
    assert all("\x00" not in words for words in hostile.sections.values())


@pytest.mark.parametrize(
    "gone, section, command",
    [
        (("evaluate",), "results", "make evaluate DATASET=synthetic RUN=base"),
        (("evaluate", "ppo"), "alarms", "make ppo DATASET=synthetic RUN=base"),
        (("reward", "ppo"), "reward", "make reward DATASET=synthetic RUN=base"),
        (("reward",), "truth", "make reward DATASET=synthetic RUN=base"),
        (("pretrain",), "learning", "make pretrain DATASET=synthetic RUN=base"),
        (("sft", "reward", "ppo", "evaluate"), "learning", "make sft DATASET=synthetic RUN=base"),
    ],
)
def test_a_missing_stage_is_named_with_its_command(root, tmp_path, gone, section, command):
    shutil.copytree(root, tmp_path / "root")
    for stage in gone:
        shutil.rmtree(tmp_path / "root" / "runs" / "base" / stage)
    missing = Page(report.run(config(tmp_path / "root")).read_text())
    assert list(missing.sections) == list(sections.SECTIONS)
    assert "Missing" in missing.sections[section] and command in missing.sections[section]
    assert command in missing.sections["provenance"]


def test_missing_data_studies_and_runs(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "data")
    shutil.rmtree(tmp_path / "root" / "runs" / "ablation")
    bare = Page(report.run(config(tmp_path / "root")).read_text())
    assert "make prepare DATASET=synthetic" in bare.sections["data"]
    assert "make ablation DATASET=synthetic" in bare.sections["studies"]
    assert "make coldstart DATASET=synthetic" not in bare.sections["studies"]
    assert "Missing" not in bare.sections["results"] and "EASE" in bare.sections["results"]
    assert "no prepared data" in bare.sections["examples"]
    shutil.rmtree(tmp_path / "root" / "runs" / "base" / "baselines")
    shutil.rmtree(tmp_path / "root" / "runs" / "coldstart")
    bare = Page(report.run(config(tmp_path / "root")).read_text())
    assert "make baselines DATASET=synthetic" in bare.sections["results"]
    assert "make coldstart DATASET=synthetic" in bare.sections["studies"]
    with pytest.raises(PageLLMError, match="make evaluate DATASET=nobody RUN=nobody"):
        report.run(config(root, run="nobody"))
    with pytest.raises(PageLLMError, match="examples=-1"):
        config(root, examples=-1)


def test_a_file_of_something_else_is_not_overwritten(root, tmp_path):
    mine = tmp_path / "orders.csv"
    mine.write_text("user,item\n")
    with pytest.raises(PageLLMError, match="orders.csv: it is a file of something else"):
        report.run(config(root, out=str(mine)))
    assert mine.read_text() == "user,item\n"
    for _ in range(2):  # a report is replaced by the next
        assert report.run(config(root, out=str(tmp_path / "r.html"))).exists()


def test_damage_is_told_not_hidden(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    runs = tmp_path / "root" / "runs"
    with open(runs / "base" / "ppo" / "log.jsonl", "a") as file:
        file.write('{"step": 99, "objec')  # what a killed process leaves
    (runs / "base" / "reward" / "model.pt").write_bytes(b"no model")
    pq.write_table(pa.table({"a": [1]}), runs / "ablation" / "synthetic-other.parquet")
    found = findings.read(str(runs), "base", str(tmp_path / "root" / "data"))
    assert found.stages["ppo"].log[-1]["step"] < 99
    hurt = Page(report.build(found, config(tmp_path / "root")))
    for section in ("reward", "truth", "positions", "examples"):
        assert (
            "model.pt" in hurt.sections[section] and "changed or damaged" in hurt.sections[section]
        ), section
    assert "synthetic-other.parquet is no table of a study" in hurt.sections["provenance"]


def test_pages_of_another_library_are_scored_like_ours(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    base = tmp_path / "root" / "runs" / "base"
    (base / "other" / "mylib").mkdir(parents=True)
    shutil.copy(base / "evaluate" / "sft" / "pages.parquet", base / "other" / "mylib")
    found = findings.read(str(base.parent), "base", str(tmp_path / "root" / "data"))
    theirs, ours = found.results["other/mylib"], found.results['SFT = "w/o reward"']
    assert set(theirs) == set(ours)
    assert all(theirs[m]["mean"] == ours[m]["mean"] for m in ours)


def test_baselines_of_the_data_set_count_unless_the_mask_differs(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    runs = tmp_path / "root" / "runs"
    (runs / "synthetic").mkdir()
    (runs / "base" / "baselines").rename(runs / "synthetic" / "baselines")

    def read():
        return findings.read(str(runs), "base", str(tmp_path / "root" / "data"))

    assert {"EASE", "EASE, refit"} <= set(read().results) and set(read().per_user) > {
        "EASE, refit",
        "ppo",
    }
    path = runs / "synthetic" / "baselines" / "config.json"
    made = json.loads(path.read_text())
    made["config"]["mask"] = "train"
    path.write_text(json.dumps(made))
    assert "EASE" not in read().results and any("another mask" in note for note in read().notes)


def test_pages_of_changed_data_are_not_shown(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    path = tmp_path / "root" / "data" / "synthetic" / "source.json"
    path.write_text(path.read_text() + "\n")
    changed = Page(report.run(config(tmp_path / "root")).read_text())
    for section in ("positions", "examples", "provenance"):
        assert "has changed since these pages were evaluated" in changed.sections[section]


def test_hits_agree_with_a_plain_loop(root):
    found = findings.read(str(root / "runs"), "base", str(root / "data"))
    pages, shop = found.pages["ppo"], found.shop
    rng = np.random.default_rng(0)
    mixed = RankedPages(
        pages.user,
        rng.integers(0, shop.n_items, (len(pages.user), 9)),
        None,
        rng.integers(0, 10, len(pages.user)),
    )
    for some in (pages, mixed):
        exact, same = measure.hits(some, found.scorer, 6)
        assert exact.any() and same.any() and not (exact & same).any()
        for row, user in enumerate(some.user):
            held = set(found.scorer.held.of(user)[0].tolist())
            leaves = {shop.catalogue.leaf[i] for i in held} - {""}
            for slot in range(6):
                on = slot < min(some.slots[row], 6)
                item = int(some.item[row, slot])
                assert exact[row, slot] == (on and item in held)
                assert same[row, slot] == (
                    on and item not in held and shop.catalogue.leaf[item] in leaves
                )


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 8))
def test_bins_are_a_partition_in_rising_order(values, n):
    values = np.array(values)
    groups = measure.bins_of(values, n)
    assert sorted(np.concatenate(groups).tolist() if groups else []) == list(range(len(values)))
    assert len(groups) <= n and all(len(g) for g in groups)
    assert all(values[a].max() < values[b].min() for a, b in zip(groups, groups[1:], strict=False))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9), st.booleans())
@example(6e-11, 1e-6, 2, True)  # no whole number inside, one close by
def test_ticks_are_round_even_and_inside(low, span, most, whole):
    high = low + max(span, 1e-9 * abs(low))
    found = plots.ticks(low, high, most, whole)
    assert len(found) <= most + 1
    slack = 1e-6 * (high - low)
    assert all(low - slack <= x <= high + slack for x in found)
    assert not whole or all(x == int(x) for x in found)
    names = plots.tick_names(found)
    assert len(set(names)) == len(names)
    gaps = np.diff(found)
    assert len(gaps) == 0 or np.allclose(gaps, gaps[0], rtol=1e-3)


def test_curves_of_nothing_one_point_and_gaps_are_drawn():
    one, gap = np.array([1]), np.array([0.0, np.nan, 2.0, 3.0])
    for curves in ({}, {"a": (one, one * 2.5)}, {"a": (np.arange(4), gap, gap - 1, gap + 1)}):
        drawn = plots.lines(curves, "x", "y", "a figure with 0 or more curves")
        assert "nan" not in drawn and drawn.startswith("<svg viewBox")
    assert drawn.count("M") >= 2  # the gap lifts the pen


def test_dollars_in_names_are_no_formula():
    drawn = plots.dots(
        ["$a_b$ $"], {"$x^2$": [(0, 0, 1)], "b": [None]}, r"$\frac{", "one dot at 0 of $x^2$"
    )
    words = "".join(re.findall(r">([^<]+)</text>", drawn))
    assert "$a_b$ $" in words and "$x^2$" in words and r"$\frac{" in words


def test_series_differ_without_colour():
    x = np.arange(4.0)
    drawn = plots.lines({f"s{i}": (x, x + i) for i in range(6)}, "x", "y", "six lines from 0 to 8")
    strokes = re.findall(
        r'<path d="M[^"]*"[^>]*style="fill: none; (stroke-dasharray: [^;]*)?[^"]*var\(--s\d\)',
        drawn,
    )
    assert len({*plots.STYLES[:4]}) == 4 and len(set(plots.MARKERS)) == 6
    assert len(set(strokes)) == 6, strokes
