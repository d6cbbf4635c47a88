"""What a teacher writes for some people, kept to teach a small model.

Reads   data/<dataset>, runs/<run>/storefront/build and tune
Writes  runs/<run>/storefront/teach/traces.jsonl        see docs/reference/files.md

    pagellm storefront teach --people 300                       the teacher `search`
    pagellm storefront teach --writer http --url http://127.0.0.1:8080/v1 --model NAME

People are split 80/10/10 into train, valid and test by a hash of their identifier, before anything
is written. Teachers know train orders alone. The same command carries on where it was stopped, and
leaves the same bytes.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import file_id, read_json
from pagellm.stage.hints import counted
from pagellm.stage.run import Run, finished
from pagellm.storefront import gates
from pagellm.storefront.corpus import prune
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.offers import open_rows_of, text_decisions
from pagellm.storefront.parts import Answer, Keyword, Placement, Theme
from pagellm.storefront.prompts import (
    Question,
    clean,
    keywords_question,
    tagged_line,
    theme_question,
)
from pagellm.storefront.remote import Remote, bought_by
from pagellm.storefront.search import Objective, Search, passes
from pagellm.storefront.themes import Template

__all__ = ["Config", "appended", "part_of", "read_traces", "run", "template_of", "traces_of"]

FITTING = 5  # items of a row whose fit is looked at


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Let a teacher write rows for some people, and keep what it wrote."""

    writer: str = "search"  # the teacher: search, which tries many keywords; http, a model on a
    # server; or replay, lm, template
    people: int = 300  # users, drawn by seed; 0: all

    def __post_init__(self):
        super().__post_init__()
        check(self, people=(self.people >= 0, "0 or more"))


def part_of(user: str) -> str:
    """train, valid or test (80/10/10), by a hash of the shop's identifier."""
    tenth = hashlib.blake2b(user.encode(), digest_size=8).digest()[0] % 10
    return ("valid", "test")[tenth - 8] if tenth >= 8 else "train"


def template_of(writer) -> Template:
    """The template writer that drafts the rows of any writer."""
    if isinstance(writer, Remote | Search):
        return writer.template
    assert isinstance(writer, Template)
    return writer


def looked_at(worth: Objective, theme: Theme, keywords: list[Keyword]) -> dict:
    """score (J), tp5 (by the theme's mission) and whether the gates let the row pass."""
    front = worth.front
    worth.about(theme)
    found = worth.candidates(keywords)
    first = worth.order(found)
    items = found.item[first[:FITTING]]
    least = front.policy.min_items
    row = Placement("", theme.intent, len(first), min_items=least)
    looks = text_decisions(front, theme)
    looks += gates.check_placement(found.agree[first], row, front.threshold)
    fits = front.missions.of_item[items] == theme.mission
    return {
        "score": round(worth(keywords), 6),
        "tp5": float(fits.mean()) if len(fits) else 0.0,
        "passes": passes(worth, keywords) and not gates.blocked(looks),
    }


def trace(
    question: Question, output: list[str], answer: Answer, score: dict, template: float
) -> dict:
    """One answer as a line of the file. template: J of what the template writer says."""
    return {
        "task": question.kind,
        "prompt": tagged_line(question),
        "offered": question.data.get("offered", question.data.get("categories")),
        "output": output,
        **score,
        "template": template,
        "tokens": [answer.prompt_tokens, answer.completion_tokens],
    }


def traces_of(store: Store, user: int) -> list[dict]:
    """Two traces of each row that the store's writer has for a person: its title, its keywords.

    `other` is what the person's next row says instead: an answer to another question, whose score
    for this one is known, for tests with wrong labels.
    """
    front, name = store.front, store.shop.user_ids[user]
    writer, template = front.writer, template_of(front.writer)
    context, intents, used = open_rows_of(front, store.known.context(name), store.layout)
    drafts = themes_by_mission(template, context, intents, used)
    named = [
        (drafts[answer.value.intent, answer.value.mission], answer.value, answer)
        for answer in writer.themes([context], [intents], [used])[0][: len(intents)]
        if answer.value is not None
        and not answer.problem
        and (answer.value.intent, answer.value.mission) in drafts
    ]
    themes, people = [theme for _, theme, _ in named], [context] * len(named)
    offered = [prune(front.corpus, theme) for theme in themes]
    chosen = writer.keywords(themes, people, offered)
    plain = [answer.value or [] for answer in template.keywords(themes, people, offered)]
    bought, found = bought_by(template, context), []
    for at, (draft, theme, answer) in enumerate(named):
        after = (at + 1) % len(named)
        worth = Objective(front, context, theme)
        about = {"user": user, "part": part_of(name), "mission": theme.mission}
        about |= {"teacher": writer.name}
        question = theme_question(draft, bought, [*used, *(t.title for t in themes[:at])])
        wrong = replace(theme, title=themes[after].title)
        line = trace(
            question,
            [theme.title],
            answer,
            looked_at(worth, theme, plain[at]),
            looked_at(worth, draft, plain[at])["score"],
        )
        other = {"output": [wrong.title], **looked_at(worth, wrong, plain[at])}
        found.append(about | line | {"other": other})
        keywords, others = chosen[at].value, chosen[after].value
        if keywords and others and not chosen[at].problem:
            texts = [clean(front.corpus.text[w]) for w in offered[at].tolist()]
            line = trace(
                keywords_question(theme, texts),
                [keyword.text for keyword in keywords],
                chosen[at],
                looked_at(worth, theme, keywords),
                looked_at(worth, theme, plain[at])["score"],
            )
            other = {"output": [k.text for k in others], **looked_at(worth, theme, others)}
            found.append(about | line | {"other": other})
    return found


def themes_by_mission(template: Template, context, intents, used) -> dict:
    """(intent, mission) -> the theme that the template writer drafts."""
    offers = template.themes([context], [intents], [used])[0]
    drafts = [answer.value for answer in offers if answer.value is not None]
    return {(draft.intent, draft.mission): draft for draft in drafts}


def read_traces(path: Path) -> list[dict]:
    """The traces of a file. Raises PageLLMError for one that is not there or damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise PageLLMError(f"no {path}; make it with: pagellm storefront teach") from None
    except ValueError as error:
        raise PageLLMError(
            f"{path} is damaged ({error})\n  Remove {path.parent} and let it be made again."
        ) from None


@contextmanager
def appended(path: Path) -> Iterator[TextIO]:
    """The file, to write more lines to it. Raises PageLLMError on a full disk.

    Closing a file writes what is left of it, and so may fail again: that is caught too.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise PageLLMError(
            f"{path} cannot be written ({error})\n  Make room; the same command carries on."
        ) from None


def carried_on(path: Path, people: list[int]) -> int:
    """How many people of the list have all their lines in a file that a stopped run left.

    The last of them may lack lines, so they are taken out, with a line that was half written.
    """
    if not path.exists():
        return 0
    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        users = [json.loads(line)["user"] for line in lines]
        done = [people.index(user) for user in users]
    except (ValueError, KeyError, TypeError) as error:
        raise PageLLMError(
            f"{path} is damaged ({error})\n  Remove {path.parent}; the same command begins anew."
        ) from None
    kept = sum(user != users[-1] for user in users) if users else 0
    with open(path, "r+b") as file:
        file.truncate(sum(map(len, lines[:kept])))
    # Who has no row has no line: all before the last one that is kept are done.
    return done[kept - 1] + 1 if kept else 0


def run(config: Config) -> dict:
    """Write the traces; returns what `done` says."""
    made = config.make("storefront build")
    inputs = {"build": finished(config.stage("storefront/build"), "storefront", made)["id"]}
    tuned = config.stage("storefront/tune") / "tuned.json"
    if tuned.exists():
        inputs["weights"] = file_id(tuned)
    with Run(config.stage("storefront/teach"), config, inputs) as out:
        if out.already_done():
            return read_json(out.path / "done")
        store, path = open_store(config), out.path / "traces.jsonl"
        order = randomness.rng(config.seed, "storefront", "teach").permutation(store.shop.n_users)
        known = store.known.number
        people = [user for user in order.tolist() if store.shop.user_ids[user] in known]
        people = people[: config.people or None]
        start = carried_on(path, people)
        with appended(path) as file:
            for user in tqdm(people[start:], desc="teach", unit="person", disable=None):
                file.write("".join(json.dumps(t) + "\n" for t in traces_of(store, user)))
                file.flush()
        found = read_traces(path)
        better = [one["score"] > one["template"] for one in found if one["task"] == "keywords"]
        counts: dict[str, Any] = {
            "people": len(people),
            "traces": len(found),
            "better_than_template": float(np.mean(better)) if better else 0.0,
            "traces_id": file_id(path),
        }
        out.finish(**counts)
        print(f"{path}: {counted(len(found), 'trace')} of "
              f"{counted(len(people), 'person', 'people')} by "
              f"{store.front.writer.name}; {counts['better_than_template']:.1%} of its keywords "
              "are worth more than the template's", flush=True)  # fmt: skip
        return read_json(out.path / "done")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront teach"))
