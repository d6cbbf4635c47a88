"""Writers that ask a language model elsewhere: `http`, a server; `replay`, answers kept in a file.

writer = Remote(Server(Chat(url, model, key)), template, catalogue, known)
writer = Remote(Replay("answers.jsonl"), template, catalogue, known)

The template writer drafts each row: which categories, for whom. The model gives it a title, chooses
its concepts and its keywords. Whatever a server claims, its answers are parsed, checked against
the schema, freed of what was said twice or is not on offer, and looked at by the gates. An answer
that will not do is asked for once more, with the problem named. Then the template's own row stands,
and says why.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from pagellm.online.chat import Chat, GaveUp, Refused, Reply, object_in
from pagellm.stage.config import PageLLMError
from pagellm.storefront import gates
from pagellm.storefront.parts import Answer, Context, Keyword, Theme
from pagellm.storefront.prompts import (
    THEME_TASK,
    VERSION,
    Question,
    clean,
    keywords_question,
    theme_question,
)
from pagellm.storefront.schemas import check
from pagellm.storefront.text import stem, words
from pagellm.storefront.themes import FIRST, STEP, Template

__all__ = ["Asked", "Kept", "Read", "Remote", "Replay", "Server", "bought_by"]

Made = TypeVar("Made")
TOKENS = 400  # of an answer; twice as many when it was cut off
MOST = 8  # keywords of a theme
PAUSE = 60.0  # seconds in which a server that gave no answer is not asked again
TAUGHT = " taught"  # ends the name of a model that was taught these questions
FORMS = ("json_schema", "json_object", "")  # what a server may be told of the answer's form
Read = Callable[[dict], dict]  # raises ValueError, which names what is wrong


class Asked(Protocol):
    """Whoever answers questions. name: of model and prompts together."""

    @property
    def name(self) -> str: ...

    def ask(self, question: Question, read: Read) -> Answer[dict]:
        """What `read` makes of the answer, or why there is none."""


class Server:
    """A chat server.

    clock  seconds, rising
    """

    def __init__(self, chat: Chat, clock: Callable[[], float] = time.monotonic):
        self.chat, self.clock = chat, clock
        self.name = f"http {chat.model} {VERSION}"
        self.form = 0  # place in FORMS of what the server is known to take
        self.silent, self.why = -PAUSE, ""  # when it last gave no answer at all, and why

    def ask(self, question: Question, read: Read) -> Answer[dict]:
        """One question, and one repair. Never raises for what the server does."""
        if self.clock() < self.silent + PAUSE:
            return Answer(None, f"not asked: {self.why}")
        started, told, problem = time.perf_counter(), [0, 0], ""
        messages, tokens, value = question.messages, TOKENS, None
        try:
            for attempt in (0, 1):
                reply, problem = self.once(question, messages, tokens, attempt)
                told = [told[0] + reply.prompt_tokens, told[1] + reply.completion_tokens]
                if not problem:
                    value, problem = accepted(question, reply, read)
                if not problem:
                    break
                tokens = 2 * TOKENS if reply.finish == "length" else TOKENS
                again = f"Your answer cannot be used: {problem}. Answer again, as asked."
                messages = [*question.messages, {"role": "user", "content": again}]
        except (Refused, GaveUp) as error:
            problem = str(error).splitlines()[0].replace(self.chat.url, "the server")
            self.silent, self.why = self.clock(), problem
        return Answer(value, problem, told[0], told[1], time.perf_counter() - started)

    def once(
        self, question: Question, messages: list[dict], tokens: int, attempt: int
    ) -> tuple[Reply, str]:
        """A reply and "", or what was wrong with it as a chat completion.

        A server that refuses one form of `response_format` is told the next one. A repair uses the
        second form, for servers that pass over the first without a word.
        """
        while True:
            form = max(self.form, min(attempt, 1))
            body = {"temperature": 0, "max_tokens": tokens, "messages": messages}
            if FORMS[form] == "json_schema":
                about = {"name": question.kind, "strict": True, "schema": question.schema}
                body["response_format"] = {"type": "json_schema", "json_schema": about}
            elif FORMS[form]:
                body["response_format"] = {"type": "json_object", "schema": question.schema}
            try:
                return self.chat.ask(body, lambda reply: (reply, ""), no_reply, again=0)
            except Refused as error:
                if error.status not in (400, 422) or form + 1 == len(FORMS):
                    raise
                self.form = form + 1


def no_reply(said: str) -> tuple[Reply, str]:
    return Reply(""), f"the reply is no chat completion ({clean(said)})"


def accepted(question: Question, reply: Reply, read: Read) -> tuple[dict | None, str]:
    """What `read` makes of a reply, or None and the problem."""
    if reply.finish == "length":
        return None, f"it was cut off after {reply.completion_tokens or TOKENS} tokens"
    field = "title" if question.kind == "theme" else "keywords"
    try:
        return read(object_in(reply.text, field)), ""
    except (ValueError, RecursionError) as error:
        return None, clean(str(error)) or type(error).__name__


def entries(path: Path) -> list[dict]:
    """Lines of a file of answers. Passes over a half-written one, as a killed process leaves it."""
    found = []
    # Bytes that are no text are read as a sign that no answer may hold.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            tokens = [int(n) for n in entry["tokens"]]
            value, problem = entry["value"], str(entry["problem"])
            if isinstance(value, dict) or (value is None and problem):
                found.append(entry | {"answer": Answer(value, problem, *tokens[:2])})
        except (ValueError, KeyError, TypeError):
            continue
    return found


class Kept:
    """Keeps answers in a JSON lines file, so that each question is answered once."""

    def __init__(self, asked: Asked, path: str | Path):
        self.asked, self.name, self.path = asked, asked.name, Path(path)
        self.lock = threading.Lock()
        self.known = {
            entry["key"]: entry["answer"]
            for entry in entries(self.path)
            if entry.get("writer") == self.name and entry["answer"].value is not None
        }
        self.broken = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")

    @property
    def table(self):
        return getattr(self.asked, "table", None)

    def ask(self, question: Question, read: Read) -> Answer[dict]:
        """Raises PageLLMError where the answer cannot be kept, such as on a full disk.

        A kept answer that will not do today, since the policy is another one or somebody changed
        the file, is asked for anew.
        """
        if (answer := self.known.get(question.key)) is not None and answer.value is not None:
            try:
                return replace(answer, value=read(answer.value))
            except ValueError:
                pass
        answer = self.asked.ask(question, read)
        tokens = [answer.prompt_tokens, answer.completion_tokens]
        entry = {
            "writer": self.name,
            "key": question.key,
            "kind": question.kind,
            "value": answer.value,
            "problem": answer.problem,
            "tokens": tokens,
        }
        with self.lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("\n" * self.broken + json.dumps(entry) + "\n")
            except OSError as error:
                raise PageLLMError(
                    f"{self.path}: the answer cannot be kept ({error})\n"
                    "  Make room, or name another file by --answers; kept answers stay."
                ) from None
            self.broken = False
            if answer.value is not None:
                self.known[question.key] = answer
        return answer


class Replay:
    """Answers of one writer out of a file that Kept wrote. Its name is that writer's.

    Raises PageLLMError for a file that is missing or holds no one writer's answers, and for a
    question that it does not answer.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise PageLLMError(
                f"no answers {str(path)!r}\n"
                "  Write them with --writer http --answers FILE, and give that file."
            )
        found = [entry for entry in entries(self.path) if {"writer", "key"} <= set(entry)]
        names = sorted({str(entry["writer"]) for entry in found})
        if len(names) != 1:
            raise PageLLMError(
                f"{path} holds answers of {', '.join(names) or 'nobody'}; want one writer's"
            )
        self.name = names[0]
        self.known = {entry["key"]: entry["answer"] for entry in found}

    def ask(self, question: Question, read: Read) -> Answer[dict]:
        if question.key not in self.known:
            raise PageLLMError(
                f"{self.path} has no answer to question {question.key}: {question.kind} of the "
                f"row {question.about!r}\n  Replay the people, layout and build that were asked."
            )
        answer = self.known[question.key]
        if answer.value is None:
            return answer
        try:
            return replace(answer, value=read(answer.value))
        except ValueError as error:
            raise PageLLMError(
                f"{self.path}: the answer to question {question.key} will not do ({error})\n"
                "  Somebody changed the file, or the policy is another one; ask anew."
            ) from None


def bought_by(template: Template, context: Context) -> list[tuple[str, int]]:
    """Categories of what a person bought, with counts, the most frequent first.

    None that no row may name: what is restricted is told to nobody.
    """
    missions, orders = template.missions, Counter[str]()
    for item, count in zip(context.item.tolist(), context.count.tolist(), strict=True):
        c = int(missions.category[item])
        if c >= 0 and template.nameable[c]:
            orders[missions.names[c]] += count
    return sorted(orders.items(), key=lambda pair: (-pair[1], pair[0]))


@dataclass(frozen=True)
class Remote:
    """See the module.

    template  drafts the rows, and stands in
    known     stems of the catalogue's words: gates.known_words
    """

    asked: Asked
    template: Template
    known: frozenset[str]
    chooses: bool = True  # keywords are chosen from all that are offered

    @property
    def name(self) -> str:
        return self.asked.name

    @property
    def table(self):
        """Where several people's questions are answered side by side; None: one after another."""
        return getattr(self.asked, "table", None)

    def themes(
        self, contexts: list[Context], intents: list[list[str]], used: list[list[str]]
    ) -> list[list[Answer[Theme]]]:
        """For each context a theme for each of its placements, best first.

        An answer with a problem holds the template's own theme.
        """
        drafts = self.template.themes(contexts, intents, used)
        found = []
        for context, wanted, titles, offers in zip(contexts, intents, used, drafts, strict=True):
            bought, left = bought_by(self.template, context), Counter(wanted)
            answers: list[Answer[Theme]] = []
            for draft in [answer.value for answer in offers if answer.value is not None]:
                if left[draft.intent]:
                    left[draft.intent] -= 1
                    above = [a.value.title for a in answers if a.value is not None]
                    answers.append(self.theme(draft, bought, [*titles, *above], context.season))
            found.append(answers)
        return found

    def theme(
        self,
        draft: Theme,
        bought: list[tuple[str, int]],
        used: list[str],
        season: tuple[str, ...] = (),
    ) -> Answer[Theme]:
        question = theme_question(draft, bought, used, season)
        own = {clean(name): name for name in draft.concepts}

        def read(value: dict) -> dict:
            return read_theme(value, question, own, self.refusal, used)

        answer = self.asked.ask(question, read)
        if answer.value is None:
            return like(answer, draft, self.instead(answer))
        value = answer.value
        concepts = tuple(own[name] for name in value["concepts"])
        theme = replace(
            draft,
            title=value["title"],
            subtitle=value.get("subtitle", ""),
            concepts=concepts,
            source=self.name,
        )
        return like(answer, theme)

    def instead(self, answer: Answer) -> str:
        return f"{self.name}: {answer.problem}; {self.template.name} instead"

    def refusal(self, title: str, subtitle: str) -> str:
        """Why the gates are against a text, "" where they are not."""
        policy = self.template.policy
        decisions = gates.check_text(title, subtitle, policy, self.known, THEME_TASK)
        theme = Theme(title, "browse", (), subtitle)
        decisions += gates.check_theme(theme, (), None, policy)
        rule = next((d.rule for d in decisions if d.action != "pass"), "")
        if not rule and len(title) == gates.LONGEST and stem(words(title)[-1]) not in self.known:
            return "the title is cut inside a word"
        return f"the title is blocked by the rule {rule}" if rule else ""

    def keywords(
        self, themes: list[Theme], contexts: list[Context], offered: list[np.ndarray], m: int = MOST
    ) -> list[Answer[list[Keyword]]]:
        """For each theme keywords out of those offered, the model's first choice first.

        The template's own keywords for its own themes, and where the model's will not do. A model
        that was taught these questions is asked for both: its keywords may be good where its title
        was not.
        """
        drafts = self.template.keywords(themes, contexts, offered, m)
        return [
            self.chosen(theme, numbers, draft, m)
            for theme, numbers, draft in zip(themes, offered, drafts, strict=True)
        ]

    def chosen(
        self, theme: Theme, numbers: np.ndarray, draft: Answer[list[Keyword]], m: int
    ) -> Answer[list[Keyword]]:
        corpus = self.template.corpus
        number = {clean(corpus.text[w]): w for w in numbers.tolist()}
        if not number or (theme.source != self.name and not self.name.endswith(TAUGHT)):
            return draft
        question = keywords_question(theme, list(number))
        answer = self.asked.ask(question, lambda value: read_keywords(value, question))
        if answer.value is None:
            return like(answer, draft.value, self.instead(answer))
        texts = answer.value["keywords"][:m]
        found = [corpus.keyword(number[text], FIRST - STEP * k) for k, text in enumerate(texts)]
        return like(answer, found)


def like(answer: Answer, value: Made | None, problem: str = "") -> Answer[Made]:
    """Another value at the cost of an answer."""
    cost = (answer.prompt_tokens, answer.completion_tokens, answer.seconds)
    return Answer(value, problem, *cost)


def read_theme(
    value: dict,
    question: Question,
    own: dict[str, str],
    refusal: Callable[[str, str], str],
    used: list[str],
) -> dict:
    """Title, subtitle and concepts of an answer. Raises ValueError, which names what is wrong."""
    kept = {name: value[name] for name in ("title", "subtitle", "concepts") if name in value}
    for name in ("title", "subtitle"):
        if isinstance(kept.get(name), str):
            kept[name] = " ".join(kept[name].split())
    if isinstance(kept.get("concepts"), list):
        said = [name for name in kept["concepts"] if isinstance(name, str) and name in own]
        kept["concepts"] = list(dict.fromkeys(said))[:MOST]
    if problems := check(kept, question.schema):
        raise ValueError("; ".join(problems[:3]))
    if kept["title"].lower() in {title.lower() for title in used}:
        raise ValueError("the title stands on the page already")
    if why := refusal(kept["title"], kept.get("subtitle", "")):
        raise ValueError(why)
    return kept


def read_keywords(value: dict, question: Question) -> dict:
    """The keywords of an answer that are on offer, none twice. Raises ValueError for too few."""
    said, offered = value.get("keywords"), set(question.data["offered"])
    if isinstance(said, list):
        kept = [text for text in said if isinstance(text, str) and text in offered]
        value = {"keywords": list(dict.fromkeys(kept))[:MOST]}
    if problems := check(value, question.schema):
        raise ValueError("; ".join(problems[:3]))
    return value
