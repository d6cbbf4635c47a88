"""The student learns which of its own answers is worth more (direct preference optimisation).

Reads   runs/<run>/storefront/{build, tune, student-clean}
Writes  runs/<run>/storefront/prefer    pairs/pairs.jsonl, and model, for --writer lm --weights

    pagellm storefront prefer --people 60

For rows of train people the student draws four sets of keywords at temperature .8. Where the best
and the worst of them differ by 5% of J (search.py), they are a pair, and the loss is

    -ln sigma(.1 [(log p(better) - log p0(better)) - (log p(worse) - log p0(worse))])

with p0 the student as it was. The result is kept only if J of people in the valid part rises, and
the 95% interval of the paired difference lies above 0; else the student stays as it was.
Source: Rafailov et al., arXiv 2305.18290.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pagellm.model import networks
from pagellm.model.backbone import Backbone
from pagellm.model.prompts import Example, right_pad
from pagellm.model.vocab import Vocab
from pagellm.pages import stats
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic_folder, file_id, read_json
from pagellm.stage.hints import counted
from pagellm.stage.run import Run, finished
from pagellm.stage.train import GuardedStep, batch_at, logged, optimiser, progress
from pagellm.storefront.corpus import prune
from pagellm.storefront.front import Sources, Store, open_store
from pagellm.storefront.local import Local
from pagellm.storefront.offers import open_rows_of
from pagellm.storefront.parts import Context, Theme
from pagellm.storefront.prompts import Question, clean, keywords_question, tagged_line
from pagellm.storefront.search import Objective
from pagellm.storefront.student import example_of
from pagellm.storefront.teach import appended, carried_on, part_of, read_traces, template_of
from pagellm.storefront.themes import FIRST, STEP

__all__ = ["Config", "answer_logp", "preference_loss", "run"]

BETA = 0.1  # weight of the log-ratios
APART = 0.05  # share of J by which the best and the worst answer must differ


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Teach the student which of its own sets of keywords is worth more."""

    labels: str = "clean"  # the student: clean or raw, as in `pagellm storefront student`
    people: int = 60  # train people, drawn by seed, whose rows are asked for
    valid_people: int = 40  # people of the valid part by whom the result is judged
    samples: int = 4  # answers drawn to each question
    temperature: float = 0.8  # at which they are drawn
    batch: int = 8  # pairs in a step; there is one epoch
    lr: float = 1e-5  # learning rate

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            labels=(self.labels in ("clean", "raw"), "clean or raw"),
            people=(self.people > 0, "1 or more"),
            valid_people=(self.valid_people > 1, "2 or more, so that there is an interval"),
            samples=(self.samples > 1, "2 or more"),
            temperature=(self.temperature > 0, "above 0"),
            batch=(self.batch > 0, "1 or more"),
            lr=(self.lr > 0, "above 0"),
            writer=(self.writer == "template", "no writer: the student writes"),
        )


def preference_loss(better: Tensor, worse: Tensor, beta: float = BETA) -> Tensor:
    """() mean of -ln sigma(beta (better - worse)); both (B,) log p - log p0 of an answer, nats."""
    return -F.logsigmoid(beta * (better - worse)).mean()


def answer_logp(model: Backbone, vocab: Vocab, examples: list[Example]) -> Tensor:
    """(B,) log-probability of each answer given its question, in nats."""
    ids = right_pad([e.ids for e in examples], vocab.pad).to(model.word.device)
    counts = right_pad([list(map(int, e.mask)) for e in examples], 0).to(ids.device)[:, 1:]
    logits = model.word_logits(model(ids)[:, :-1])[..., : vocab.n_words].float()
    target = ids[:, 1:].clamp(max=vocab.n_words - 1)
    logp = torch.log_softmax(logits, dim=-1).gather(-1, target[..., None])[..., 0]
    return (logp * counts).sum(1)


def asked_of(store: Store, user: int) -> list[tuple[Context, Theme, Question]]:
    """A person's rows as the template drafts them, and the question for each row's keywords."""
    front = store.front
    context = store.known.context(store.shop.user_ids[user])
    told, intents, used = open_rows_of(front, context, store.layout)
    answers = template_of(front.writer).themes([told], [intents], [used])[0][: len(intents)]
    themes = [answer.value for answer in answers if answer.value is not None]
    found = []
    for theme in themes:
        texts = [clean(front.corpus.text[w]) for w in prune(front.corpus, theme).tolist()]
        if len(texts) >= 3:
            found.append((told, theme, keywords_question(theme, texts)))
    return found


def worth_of(worth: Objective, texts: list[str]) -> float:
    """J of keywords in an order."""
    corpus = worth.front.corpus
    at = [corpus.number[text] for text in texts if text in corpus.number]
    return worth([corpus.keyword(w, FIRST - STEP * k) for k, w in enumerate(at)])


def pairs_of(store: Store, local: Local, user: int, config: Config) -> list[dict]:
    """The best and the worst answer to each of a person's questions, where they differ enough."""
    found = []
    for row, (context, theme, question) in enumerate(asked_of(store, user)):
        rng = randomness.rng(config.seed, "prefer", user, row)
        worth = Objective(store.front, context, theme)
        drawn = local.drawn(question, rng, config.samples, config.temperature)
        scored = sorted((worth_of(worth, texts), texts) for texts in drawn if texts)
        if scored and scored[-1][0] - scored[0][0] >= APART * abs(scored[-1][0]):
            (low, worse), (high, better) = scored[0], scored[-1]
            about = {"user": user, "task": "keywords", "prompt": tagged_line(question)}
            found.append(about | {"better": better, "worse": worse, "score": [high, low]})
    return found


def pages_worth(store: Store, local: Local, users: list[int]) -> np.ndarray:
    """(U,) J of each person's rows together, keywords by the student."""
    found = np.zeros(len(users))
    for at, user in enumerate(users):
        for context, theme, question in asked_of(store, user):
            answer = local.ask(question, lambda value: value)
            if answer.value:
                worth = Objective(store.front, context, theme)
                found[at] += worth_of(worth, answer.value["keywords"])
    return found


def write_pairs(store: Store, local: Local, path: Path, people: list[int], config: Config) -> None:
    """All pairs of some people, from where a stopped run was.

    Raises PageLLMError on a full disk.
    """
    start = carried_on(path, people)
    with appended(path) as file:
        for user in tqdm(people[start:], desc="pairs", unit="person", disable=None):
            lines = (json.dumps(one) + "\n" for one in pairs_of(store, local, user, config))
            file.write("".join(lines))
            file.flush()


def fit(config: Config, out: Run, model: Backbone, vocab: Vocab, pairs: list[dict]) -> None:
    """One epoch over the pairs, from the newest checkpoint on."""
    sides = [
        [example_of(vocab, pair | {"output": pair[name]}, model.shape.n_ctx) for pair in pairs]
        for name in ("better", "worse")
    ]
    with torch.no_grad():
        before = [
            torch.cat(
                [answer_logp(model, vocab, side[at : at + 16]) for at in range(0, len(side), 16)]
            )
            for side in sides
        ]
    opt = optimiser(model, config.lr)
    guard, start = GuardedStep(opt, model.parameters(), 1.0), 0
    if state := out.load():
        start = state["step"]
        dist.load_weights(model, state["model"])
        dist.load_optimiser(model, opt, state["opt"])
    total = math.ceil(len(pairs) / config.batch)
    for step in out.steps(progress(start, total, "prefer")):
        _, index = batch_at(step, len(pairs), config.batch, config.seed, "prefer")
        better, worse = (
            answer_logp(model, vocab, [side[at] for at in index.tolist()]) - old[index]
            for side, old in zip(sides, before, strict=True)
        )
        loss = preference_loss(better, worse)
        loss.backward()
        norm = guard.step(f"prefer step {step}")
        out.log(step + 1, loss=logged(loss)[0], grad_norm=norm)
        if out.due(step + 1, total):
            out.save(
                {
                    "step": step + 1,
                    "model": dist.weights(model),
                    "opt": dist.optimiser_state(model, opt),
                }
            )


def parts_of(store: Store, config: Config) -> tuple[list[int], list[int]]:
    """Train people whose rows are asked for, and valid people who judge.

    Raises PageLLMError where there are too few to judge.
    """
    rng = randomness.rng(config.seed, "storefront", "prefer")
    order = rng.permutation(store.shop.n_users).tolist()
    ids = store.shop.user_ids
    train, valid = ([u for u in order if part_of(ids[u]) == name] for name in ("train", "valid"))
    if len(valid) < 2:
        raise PageLLMError(
            f"{counted(len(valid), 'person', 'people')} of {config.data_dir} kept apart to judge "
            "by, of whom two are needed\n  A tenth of a shop's people are; the student serves as "
            "it is."
        )
    return train[: config.people], valid[: config.valid_people]


def run(config: Config) -> dict:
    """Learn, judge, and write the model that is kept; returns what `done` says."""
    student = config.stage(f"storefront/student-{config.labels}")
    made = config.make("storefront student")
    inputs = {"student": finished(student, "student", made)["weights_id"]}
    build = finished(
        config.stage("storefront/build"), "storefront", config.make("storefront build")
    )
    inputs["build"] = build["id"]
    with Run(config.stage("storefront/prefer"), config, inputs) as out:
        if out.already_done():
            return read_json(out.path / "done")
        store, device = open_store(config), dist.start(config.device)
        train, valid = parts_of(store, config)
        local = Local.load(student / "model", store.front.corpus, device)
        # In a directory of its own: lines beside checkpoints are cut back to the newest of them.
        path = out.path / "pairs" / "pairs.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_pairs(store, local, path, train, config)
        pairs = read_traces(path)
        before = pages_worth(store, local, valid)
        if pairs:
            fit(config, out, local.model.train(), local.vocab, pairs)
        local.model.eval()
        after = pages_worth(store, local, valid)
        gain = stats.paired(after, before, config.seed, 1000)
        kept = bool(gain["low"] is not None and gain["low"] > 0)
        folder = out.path / "model"
        with atomic_folder(folder) as beside:
            for file in sorted((student / "model").iterdir()):
                shutil.copyfile(file, beside / file.name)  # copytree would hide a full disk
            if kept:
                networks.save_published(local.model, beside, local.vocab.n_words)
        out.finish(
            pairs=len(pairs),
            kept=kept,
            before=float(before.mean()),
            gain=gain,
            weights_id=file_id(folder / "model.safetensors"),
        )
        said = "kept" if kept else "not kept: the student stays as it was"
        people = counted(len(valid), "person", "people")
        print(f"{folder}: {counted(len(pairs), 'pair')}; J of {people} {before.mean():.4f}, "
              f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]; {said}",
              flush=True)  # fmt: skip
        return read_json(out.path / "done")


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront prefer"))
