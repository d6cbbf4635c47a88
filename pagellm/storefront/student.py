"""A small model is taught to write rows as the teacher does: titles and keywords, one network.

Reads   runs/<run>/storefront/build (the texts of its keywords) and teach/traces.jsonl
Writes  runs/<run>/storefront/student-<labels>/model        a published model's directory, for
                                                            --writer lm --weights DIRECTORY

    pagellm storefront student                              llama-mini from scratch
    pagellm storefront student --weights models/smollm2 --lr 2e-4 --batch 8 --steps 150

A question is a tag, theme or keywords, and data; the answer is a line each, and an empty line
ends a list. The loss is on the answer's tokens alone (Eq. 3 of PageLLM, pretrain.next_token_loss).

Labels are cleaned: what the gates block, what does not fit its theme, and what is worth less than
the template's own goes; then near-copies, and more than 200 rows a mission. `--labels raw` takes
everything, cut to as many rows, so that a comparison is about labels and not about their number.
`--swapped .15` gives every seventh row the answer to another question before that.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pagellm.model import lora, networks
from pagellm.model.backbone import Backbone
from pagellm.model.prompts import Example
from pagellm.model.vocab import Vocab
from pagellm.pretrain import next_token_loss
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic_folder, file_id, read_json, write_json
from pagellm.stage.hints import counted
from pagellm.stage.run import Run, TrainingConfig, finished, load_model_file
from pagellm.stage.train import GuardedStep, batch_at, logged, lr_at, optimiser, progress, set_lr
from pagellm.storefront.local import GAMMA, TAUGHT
from pagellm.storefront.teach import read_traces
from pagellm.storefront.text import words

__all__ = ["Config", "chosen_rows", "clean_rows", "example_of", "run"]

LEAST_FITTING = 0.8  # of a row's first five items
MOST_ALIKE = 0.9  # share of words that two rows may have in common
A_MISSION = 200  # rows of a mission and task


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """Teach a small model what the teacher wrote."""

    labels: str = "clean"  # rows that are learnt: clean, or raw with as many rows
    swapped: float = 0.0  # share of rows that get the answer to another question, to see what
    # cleaning is worth
    size: str = "llama-mini"  # of a network from scratch: a name as in `pagellm pretrain --size`
    weights: str = ""  # directory of a published model, which learns through adapters; empty: from
    # scratch
    lora_rank: int = 16  # with weights: rank of the adapters on q, k, v and o
    words: int = 4096  # from scratch: most words of the vocabulary (byte-level BPE)
    gamma: float = GAMMA  # weight of theme-keyword cosine beside nats a token, when it writes
    epochs: int = 3  # passes over the rows
    steps: int = 0  # optimiser steps instead; 0: as many as the epochs have
    batch: int = 64  # rows in a step
    lr: float = 1e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up
    dropout: float = 0.0  # dropout probability
    weight_decay: float = 0.01  # weight decay of the matrices (AdamW)
    grad_clip: float = 1.0  # largest gradient norm; inf: no limit

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            labels=(self.labels in ("clean", "raw"), "clean or raw"),
            swapped=(0 <= self.swapped < 1, "0 or more, below 1"),
            size=(self.size in networks.SIZES, ", ".join(networks.SIZES)),
            lora_rank=(self.lora_rank > 0, "1 or more"),
            words=(self.words >= 256, "at least 256"),
            gamma=(self.gamma >= 0, "0 or more"),
            epochs=(self.epochs > 0, "1 or more"),
            steps=(self.steps >= 0, "0 or more"),
            batch=(self.batch > 0, "1 or more"),
            lr=(self.lr > 0, "above 0"),
            dropout=(0 <= self.dropout < 1, "0 or more, below 1"),
        )

    @property
    def folder(self) -> Path:
        """Directory of the stage; each kind of labels has its own."""
        name = f"student-{self.labels}" + ("-swapped" if self.swapped else "")
        return self.stage(f"storefront/{name}")


def valid(row: dict) -> bool:
    """Whether an answer follows its schema; nothing else is asked of raw labels."""
    least, most = (1, 1) if row["task"] == "theme" else (3, 8)
    said = row["output"]
    return least <= len(said) <= most and all(3 <= len(text) <= 40 for text in said)


def with_swaps(rows: list[dict], share: float, seed: int) -> list[dict]:
    """The rows, some of them with the answer to another question, and with its score."""
    rng = randomness.rng(seed, "storefront", "swapped")
    drawn = rng.random(len(rows)) < share
    return [
        row | row["other"] if swap else row for row, swap in zip(rows, drawn.tolist(), strict=True)
    ]


def without_copies(rows: list[dict]) -> list[dict]:
    """The rows that share less than nine tenths of their words with every earlier one that stays.

    Words of question and answer together count, each once.
    """
    kept: list[dict] = []
    sets: list[set[str]] = []
    holds: dict[str, list[int]] = {}
    for row in rows:
        own = set(words(f"{row['prompt']} {' '.join(row['output'])}"))
        shared = np.zeros(len(kept), dtype=np.int64)
        for word in own:
            shared[holds.get(word, [])] += 1
        union = np.array([len(one) for one in sets], dtype=np.int64) + len(own) - shared
        if len(kept) and float((shared / np.maximum(union, 1)).max()) >= MOST_ALIKE:
            continue
        for word in own:
            holds.setdefault(word, []).append(len(kept))
        kept.append(row)
        sets.append(own)
    return kept


def clean_rows(rows: list[dict]) -> list[dict]:
    """Rows whose answer the gates pass, fits its theme and is worth what the template's is."""
    good = [
        row
        for row in rows
        if row["passes"] and row["tp5"] >= LEAST_FITTING and row["score"] >= row["template"]
    ]
    kept, of_mission = [], dict[tuple[str, int], int]()
    for task in ("theme", "keywords"):
        for row in without_copies([row for row in good if row["task"] == task]):
            key = task, row["mission"]
            of_mission[key] = of_mission.get(key, 0) + 1
            if of_mission[key] <= A_MISSION:
                kept.append(row)
    return kept


def chosen_rows(traces: list[dict], labels: str, swapped: float, seed: int) -> list[dict]:
    """The train rows that are learnt: as many raw ones of each task as there are clean ones.

    Raises PageLLMError where none is left.
    """
    rows = [row for row in traces if row["part"] == "train" and valid(row)]
    rows = with_swaps(rows, swapped, seed)
    clean = clean_rows(rows)
    if not clean:
        raise PageLLMError(
            f"none of the {len(rows)} train rows is clean enough to be learnt\n"
            "  Let a teacher write more: pagellm storefront teach --people 0"
        )
    if labels == "clean":
        return clean
    raw, rng = [], randomness.rng(seed, "storefront", "raw")
    for task in ("theme", "keywords"):
        some = [row for row in rows if row["task"] == task]
        n = sum(row["task"] == task for row in clean)
        raw += [some[at] for at in np.sort(rng.permutation(len(some))[:n]).tolist()]
    return raw


def example_of(vocab: Vocab, row: dict, room: int) -> Example:
    """Question and answer as tokens; the answer's are to be predicted."""
    (newline,) = vocab.words("\n")
    target: list[int] = []
    for line in row["output"]:
        target += [*vocab.words(line), newline]
    if row["task"] == "keywords":
        target.append(newline)  # an empty line ends the list
    return Example.of([*vocab.words(row["prompt"]), newline], target, "words", room)


def new_model(config: Config, rows: list[dict], texts: list[str]) -> tuple[Backbone, Vocab]:
    """The network before its first step, and its words."""
    if config.weights:
        path = Path(config.weights)
        if not path.is_dir():
            raise PageLLMError(
                f"no model directory {config.weights!r}; make one of a GGUF file: "
                "pagellm import-gguf FILE --out DIRECTORY"
            )
        vocab = Vocab.published(path, 0, 0)
        vocab.template = None
        model = networks.build(
            networks.published_shape(path), vocab.n_words + vocab.n_specials, 0, 0, config.dropout
        )
        networks.load_published(model, path, vocab.n_words, spare=True)
        lora.adapt(model, config.lora_rank, 2.0 * config.lora_rank, "q,k,v,o", vocab.n_specials)
        return model, vocab
    said = [line for row in rows for line in (row["prompt"], *row["output"])]
    vocab = Vocab.train([*said, *texts], 0, 0, config.words)
    randomness.seed_torch(config.seed, "storefront", "student")
    model = networks.build(config.size, vocab.n_words + vocab.n_specials, 0, 0, config.dropout)
    return model, vocab


def publish(model: Backbone, vocab: Vocab, config: Config, folder: Path) -> None:
    """Write a directory that `--writer lm --weights` reads."""
    with atomic_folder(folder) as beside:
        if model.lora is not None:
            lora.merge(model)
        networks.save_published(model, beside, vocab.n_words)
        if model.lora is not None:
            lora.unmerge(model)
        words_text = vocab.tokenizer.to_str(pretty=True)
        (beside / "tokenizer.json").write_text(words_text, encoding="utf-8")
        write_json(beside / TAUGHT, {"gamma": config.gamma})


@torch.no_grad()
def held_out_loss(model: Backbone, vocab: Vocab, examples: list[Example]) -> float | None:
    """Nats a token of the answers; None without any."""
    model.eval()
    parts = [
        next_token_loss(model, examples[at : at + 64], vocab.pad, vocab.n_words)
        * sum(sum(e.mask) for e in examples[at : at + 64])
        for at in range(0, len(examples), 64)
    ]
    tokens = sum(sum(e.mask) for e in examples)
    return float(sum(parts)) / tokens if tokens else None


def run(config: Config) -> dict:
    """Learn, and write the model; returns what `done` says."""
    built, made = config.stage("storefront/build"), config.make("storefront build")
    path = config.stage("storefront/teach") / "traces.jsonl"
    finished(path.parent, "teacher's answers", config.make("storefront teach"))
    inputs = {"build": finished(built, "storefront", made)["id"], "traces": file_id(path)}
    with Run(config.folder, config, inputs) as out:
        if out.already_done():
            return read_json(out.path / "done")
        traces = read_traces(path)
        rows = chosen_rows(traces, config.labels, config.swapped, config.seed)
        texts = load_model_file(built / "model.pt")["corpus"]["text"]
        model, vocab = new_model(config, rows, texts)
        device = dist.start(config.device)
        model = model.to(device)
        room = model.shape.n_ctx
        examples = [example_of(vocab, row, room) for row in rows]
        held = clean_rows([row for row in traces if row["part"] == "valid" and valid(row)])
        total = config.steps or config.epochs * math.ceil(len(examples) / config.batch)
        fit(config, out, model, vocab, examples, total)
        loss = held_out_loss(model, vocab, [example_of(vocab, row, room) for row in held])
        publish(model, vocab, config, out.path / "model")
        out.finish(
            state={"model": dist.weights(model, frozen=False)},
            rows=len(rows),
            steps=total,
            valid_loss=loss,
            weights_id=file_id(out.path / "model" / "model.safetensors"),
        )
        said = "" if loss is None else f"; {loss:.3f} nats a token of held-out answers"
        print(
            f"{out.path / 'model'}: {counted(len(rows), 'row')}, {counted(total, 'step')}{said}",
            flush=True,
        )
        return read_json(out.path / "done")


def fit(
    config: Config, out: Run, model: Backbone, vocab: Vocab, examples: list[Example], total: int
) -> None:
    """All steps, from the newest checkpoint on."""
    opt = optimiser(model, config.lr, config.weight_decay)
    guard, start = GuardedStep(opt, model.parameters(), config.grad_clip), 0
    if state := out.load():
        start = state["step"]
        dist.load_weights(model, state["model"])
        dist.load_optimiser(model, opt, state["opt"])
    lengths = tuple(len(e.ids) for e in examples)
    for step in out.steps(progress(start, total, "student")):
        began = time.time()
        model.train()
        randomness.seed_torch(config.seed, "student", "dropout", step)
        _, index = batch_at(
            step, len(examples), config.batch, config.seed, "student", length=lengths
        )
        set_lr(opt, lr_at(step, total, config.lr, min(config.warmup, total // 3)))
        batch = [examples[at] for at in index.tolist()]
        loss = next_token_loss(model, batch, vocab.pad, vocab.n_words)
        loss.backward()
        norm = guard.step(f"student step {step}")
        out.log(step + 1, loss=logged(loss)[0], grad_norm=norm, lr=opt.param_groups[0]["lr"])
        out.log(step + 1, "timing", seconds=round(time.time() - began, 4))
        if out.due(step + 1, total):
            out.save(
                {
                    "step": step + 1,
                    "model": dist.weights(model, frozen=False),
                    "opt": dist.optimiser_state(model, opt),
                }
            )


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm storefront student"))
