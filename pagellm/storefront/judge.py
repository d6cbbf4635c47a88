"""Do rows hold what their titles say? A judge looks at rows as they are served, and may stop them.

Reads   data/<dataset>, runs/<run>/storefront/build, tune and cache; labels that people filled in
Writes  runs/<run>/storefront/judge/verdicts.jsonl, judged.json; storefront/off.json, which turns
        themes off

    pagellm storefront judge                                            rules, 200 rows
    pagellm storefront judge --backend http --judge_url http://127.0.0.1:8080/v1 --judge_model NAME
    pagellm storefront judge --labels labels.csv                     a judge that people agree with

A row is the first five items of a generated row of somebody's page; it passes where four of five
fit. A judge only reports until people have shown that it can be trusted: with `--labels`, a file of
`pagellm storefront label` that people filled in, it judges the same pairs, and from 200 pairs and
Cohen's kappa of .6 on it may turn themes off. It does so where surely fewer than 85% of 200 rows
pass. No file names a person.

    rules   an item fits where its mission is that of most of the row's categories
    http    a language model behind <url>/chat/completions, at temperature 0
"""

import csv
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pagellm.online.chat import Chat, GaveUp, Refused, Reply, object_in
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json, write_json
from pagellm.stage.hints import counted
from pagellm.storefront.ahead import Ahead, Served, open_ahead
from pagellm.storefront.gates import LEAST_FITTING, LOOKED_AT, KillSwitch, clopper_pearson, kappa
from pagellm.storefront.label import read_labels
from pagellm.storefront.missions import Missions
from pagellm.storefront.parts import Row
from pagellm.storefront.prompts import JSON_ALONE, RULES, clean

__all__ = ["Config", "Http", "Judge", "Rules", "run", "trust"]

TRUSTED_LABELS, TRUSTED_KAPPA = 200, 0.6  # people's labels, and agreement with them
TASK = (
    "You see the title of one row of a shop's page, the categories it is about, and items. Say of "
    "each item whether a shopper who reads the title would expect it in that row. "
    f'{RULES} {JSON_ALONE} Form: {{"fits": [true, false, ...]}}, one for each item, in their order.'
)


@dataclass(frozen=True, kw_only=True)
class Config(Served):
    """Judge rows as they are served; a judge that people agree with may turn themes off."""

    backend: str = "rules"  # who judges: rules, or http, a language model on a server
    rows: int = 200  # rows that are judged, one a person as far as there are people
    labels: str = ""  # a file of `pagellm storefront label` that people filled in: whether the
    # judge agrees with them, and so may turn themes off
    judge_url: str = ""  # http: address up to /chat/completions; the key is that of --key_env
    judge_model: str = ""  # http: name of the model

    def __post_init__(self):
        super().__post_init__()
        served = self.backend == "http"
        check(
            self,
            backend=(self.backend in ("rules", "http"), "rules or http"),
            rows=(self.rows > 0, "1 or more"),
            judge_url=(
                served == bool(self.judge_url),
                "an address with backend=http, else none",
            ),
            judge_model=(
                served == bool(self.judge_model),
                "a name with backend=http, else none",
            ),
        )


class Judge(Protocol):
    """name: of the backend and its question together."""

    @property
    def name(self) -> str: ...

    def fits(self, title: str, about: str, items: Sequence[int]) -> list[bool] | None:
        """Whether each item belongs in the row; None where the judge gave no verdict.

        about  the row's categories, comma-separated
        """


@dataclass(frozen=True)
class Rules:
    """An item fits where its mission is that of most of the row's categories."""

    missions: Missions
    name: str = "rules/1"

    def fits(self, title: str, about: str, items: Sequence[int]) -> list[bool] | None:
        found = Counter(
            int(self.missions.of_category[c])
            for c, name in enumerate(self.missions.names)
            if f", {name}, " in f", {about}, "
        )
        if not found:
            return None
        # Of equal counts the mission with the lower number, so that the order plays no part.
        mission = min(found, key=lambda m: (-found[m], m))
        return [int(self.missions.of_item[i]) == mission for i in items]


class Http:
    """A language model. An answer without a verdict is asked for once more, and then is none."""

    def __init__(self, chat: Chat, titles: Sequence[str]):
        self.chat, self.titles = chat, titles
        self.name = f"http {chat.model} {hashlib.sha256(TASK.encode()).hexdigest()[:8]}"

    def fits(self, title: str, about: str, items: Sequence[int]) -> list[bool] | None:
        data: dict = {"title": clean(title), "about": clean(about)}
        data["items"] = [clean(self.titles[i]) for i in items]
        many = {"type": "array", "minItems": len(items), "maxItems": len(items)}
        schema = {
            "type": "object",
            "additionalProperties": False,
            "required": ["fits"],
            "properties": {"fits": many | {"items": {"type": "boolean"}}},
        }
        about_form = {"name": "verdict", "strict": True, "schema": schema}
        body = {
            "temperature": 0,
            "messages": [
                {"role": "system", "content": TASK},
                {"role": "user", "content": json.dumps(data, ensure_ascii=False)},
            ],
            "response_format": {"type": "json_schema", "json_schema": about_form},
        }

        def read(reply: Reply) -> list[bool] | None:
            said = object_in(reply.text, "fits")["fits"]
            if type(said) is not list or len(said) != len(items):
                raise ValueError(f"fits {str(said)[:80]}: want {len(items)} of true and false")
            if not all(type(one) is bool for one in said):
                raise ValueError(f"fits {str(said)[:80]}: want true and false alone")
            return said

        return self.chat.ask(body, read, lambda said: None)


def served_rows(ahead: Ahead, n: int, seed: int) -> list[Row]:
    """Generated rows as people see them, one a person in turn until there are n."""
    known, found = ahead.store.known, list[Row]()
    rng = randomness.rng(seed, "storefront", "judge")
    left: list[list[Row]] = []
    for user in rng.permutation(list(known.number)).tolist():
        if len(found) == n:
            return found
        context = known.context(user, at=ahead.at)
        made, _ = ahead.page(context, ahead.store.layout, ahead.seed)
        rows = [row for row in made.rows if row.source in ("generated", "segment")]
        if rows:
            found.append(rows.pop(int(rng.integers(len(rows)))))
            left.append(rows)
    rest = [row for rows in left for row in rows]
    return [*found, *(rest[at] for at in rng.permutation(len(rest)).tolist())][:n]


def trust(judge: Judge, labels: Sequence[dict], about: dict, number: dict) -> tuple[int, float]:
    """Pairs that people and the judge both judged, and Cohen's kappa of the two.

    labels  of label.read_labels; where people differ on a pair, most of them count
    about   title -> the row's categories, as people saw them
    number  the shop's identifier -> item
    """
    votes: dict[tuple[str, str], list[bool]] = {}
    for one in labels:
        votes.setdefault(one["pair"], []).append(one["fits"])
    rows: dict[str, list[tuple[str, bool]]] = {}
    for (title, item), said in votes.items():
        if 2 * sum(said) != len(said):
            rows.setdefault(title, []).append((item, 2 * sum(said) > len(said)))
    table = np.zeros((2, 2))
    for title, pairs in rows.items():
        own = judge.fits(title, about[title], [number[item] for item, _ in pairs])
        for (_, people), fits in zip(pairs, own or (), strict=False):
            table[int(people), int(fits)] += 1
    one_word = (table.sum(0) == table.sum()).any() or (table.sum(1) == table.sum()).any()
    return int(table.sum()), 0.0 if one_word else kappa(table)


def about_of(path: Path) -> dict[str, str]:
    """title -> the row's categories, out of a file of labels."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return {line["title"]: line.get("about") or "" for line in csv.DictReader(file)}


def judge_of(config: Config, ahead: Ahead) -> Judge:
    front = ahead.store.front
    if config.backend == "rules":
        return Rules(front.missions)
    key = os.environ.get(config.key_env, "")
    chat = Chat(
        config.judge_url, config.judge_model, key, config.budget, config.retries, config.patience
    )
    return Http(chat, front.catalogue.title)


def judged(judge: Judge, rows: Sequence[Row], ids: Sequence[str]) -> list[dict]:
    """A line a row: what was judged, and whether it passes; rows without a verdict are left out."""
    found = []
    for row in rows:
        items, about = row.item[:LOOKED_AT].tolist(), ", ".join(row.theme.concepts)
        fits = judge.fits(row.theme.title, about, items)
        if fits is not None:
            line: dict = {"judge": judge.name, "title": row.theme.title, "about": about}
            line |= {"items": [ids[i] for i in items], "fits": fits}
            found.append(line | {"passes": sum(fits) >= LEAST_FITTING * len(items)})
    return found


def run(config: Config) -> dict:
    """Judge, say what was found, and stop themes where a trusted judge surely likes too few."""
    ahead = open_ahead(config)
    try:
        judge, front = judge_of(config, ahead), ahead.store.front
        labels, agreed = 0, 0.0
        try:
            if config.labels:
                labels, agreed = agreement(config, judge, front.catalogue.ids)
            rows = served_rows(ahead, config.rows, config.seed)
            lines = judged(judge, rows, front.catalogue.ids)
        except (Refused, GaveUp) as error:
            raise PageLLMError(f"the judge gave no verdict: {error}") from None
    finally:
        ahead.cache.close()
    if not lines:
        raise PageLLMError(
            f"{judge.name} judged none of {counted(len(rows), 'generated row')}\n  Make rows first:"
            f" {config.make('storefront cache')}"
        )
    fitting = sum(line["passes"] for line in lines)
    about = {
        "judge": judge.name,
        "rows": len(lines),
        "without_a_verdict": len(rows) - len(lines),
        "fitting": fitting,
        "lower": clopper_pearson(fitting, len(lines)),
        "upper": clopper_pearson(fitting, len(lines), side="upper"),
        "labels": labels,
        "kappa": agreed,
        "trusted": labels >= TRUSTED_LABELS and agreed >= TRUSTED_KAPPA,
    }
    folder = config.stage("storefront/judge")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "verdicts.jsonl") as beside:
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_json(folder / "judged.json", about)
    tell(about)
    if about["trusted"]:
        stop(ahead.switch, fitting, len(lines))
    return about


def agreement(config: Config, judge: Judge, ids: Sequence[str]) -> tuple[int, float]:
    """What people's labels say of the judge. Raises PageLLMError for a file of other pairs."""
    key = config.stage("storefront/label") / "scores.json"
    if not key.exists():
        raise PageLLMError(f"no {key}: write pairs first with: pagellm storefront label")
    known = {(title, item) for title, item, _ in read_json(key)["scores"]}
    path = Path(config.labels)
    found = read_labels(path, known)
    return trust(judge, found, about_of(path), {name: at for at, name in enumerate(ids)})


def tell(about: dict) -> None:
    lines = [
        f"{about['judge']}: {about['fitting']} of {counted(about['rows'], 'row')} pass, surely "
        f"between {about['lower']:.3f} and {about['upper']:.3f}"
    ]
    if about["without_a_verdict"]:
        lines.append(f"{counted(about['without_a_verdict'], 'row')} without a verdict")
    if about["labels"]:
        lines.append(
            f"kappa with people {about['kappa']:.3f} on {counted(about['labels'], 'pair')}"
        )
    if not about["trusted"]:
        lines.append(
            f"this judge reports and stops nothing: that needs --labels with {TRUSTED_LABELS} "
            f"pairs or more that people judged, and a kappa of {TRUSTED_KAPPA} with them"
        )
    print("\n".join(lines), flush=True)


def stop(switch: KillSwitch, fitting: int, rows: int) -> None:
    """Let the kill switch hear of it."""
    before = switch.is_off()
    switch.judge(fitting, rows)
    if not before and switch.state:
        print(f"themes are off: {switch.folder / 'off.json'} says why; remove it to turn them on")
    elif rows < switch.JUDGED:
        print(f"fewer than {switch.JUDGED} rows: too few to stop themes by")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront judge"))
