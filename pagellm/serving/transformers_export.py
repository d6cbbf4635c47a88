"""A policy as a directory that transformers opens: words, users and items in one vocabulary.

    config.json, model.safetensors     a GPT2LMHeadModel, LlamaForCausalLM, Qwen2 or Qwen3
    tokenizer.json, tokenizer_config.json   words | special tokens | <user_ID> | <item_ID>
    generation_config.json             greedy, as many tokens as a page has slots
    pagellm.json                       which ids are items and users, the prompts' style, hashes
    README.md                          a model card: metrics, hashes, and code that writes a page

Its logits are the policy's own (to 1e-5 by test). A policy that began with `pretrain --pool` on a
GPT-2 of its own gates the items of its page: it reads an item on the page in another way than in
the history. So its vocabulary has every item twice: <item_ID> on the page, <seen_ID> in the
history. A policy that began with `--pool` beside a Llama or a published trunk is refused: it blends
states after the last norm, which no network of transformers does.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pagellm.data.shop import Shop
from pagellm.model import lora
from pagellm.model.backbone import Backbone
from pagellm.model.networks import ARCHITECTURES, published
from pagellm.model.policy import Policy
from pagellm.model.vocab import SPECIALS, Vocab
from pagellm.model.weights import write_weights
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import atomic, sha256, write_json

__all__ = ["Layout", "export_transformers", "refuse_blend", "rows_of", "token_names"]


class Layout:
    """Where each kind of token stands in the exported vocabulary.

    first  name -> its first id: specials, users, items, and seen for a gated policy
    names  the text of every token after the words, in order of ids
    """

    def __init__(self, policy: Policy, shop: Shop):
        vocab, gated = policy.vocab, policy.model.gate is not None
        self.first = {"specials": vocab.n_words, "users": vocab.user0, "items": vocab.item0}
        if gated:
            self.first["seen"] = vocab.size
        self.size = vocab.size + (vocab.n_items if gated else 0)
        self.names = token_names(vocab, shop.user_ids, shop.catalogue.ids, gated)
        self.specials = self.names[: vocab.n_specials]


def token_names(
    vocab: Vocab, users: Sequence[str], items: Sequence[str], gated: bool = False
) -> list[str]:
    """Texts of the tokens after the words: specials, users, items, and items of the history.

    Raises PageLLMError where one is a word already, or two are alike.
    """
    known = vocab.tokenizer.get_vocab(with_added_tokens=True)
    specials = [*SPECIALS, *(f"<t{at + 1}>" for at in range(vocab.times))]
    # A published tokeniser may have a <pad> of its own.
    names = [f"<pagellm_{name[1:]}" if name in known else name for name in specials]
    names += [f"<user_{one}>" for one in users] + [f"<item_{one}>" for one in items]
    names += [f"<seen_{one}>" for one in items] if gated else []
    taken = set(known)
    for name in names:
        if name in taken:
            raise PageLLMError(f"the token {name!r} would stand twice in the exported vocabulary")
        taken.add(name)
    return names


def rows_of(model: Backbone) -> tuple[Tensor, Tensor | None]:
    """Input rows (V, C) of the exported vocabulary, and output rows where they are others.

    In a gated policy the items of the page are read through the gate, and scored without it.
    """
    word = model.word if model.special is None else torch.cat([model.word, model.special])
    if model.gate is None:
        rows = torch.cat([word, model.user, model.item])
        out = None
        if model.word_out is not None or model.item_out is not None:
            out = torch.cat([model.scored_words(), model.user, model.scored_items()])
        return rows, out
    rows = torch.cat([word, model.user, model.item * model.gate, model.item])
    scored = [model.scored_words(), model.user, model.scored_items(), torch.zeros_like(model.item)]
    return rows, torch.cat(scored)


@torch.no_grad()
def weights_of(model: Backbone, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under their published names, and config.json. Adapters are merged into matrices."""
    lora.merge(model)
    weights = {
        name: w.T if name.endswith(model.TRANSPOSED) else w for name, w in published(model).items()
    }
    rows, out = rows_of(model)
    weights[model.PREFIX + model.published_name("word")] = rows
    weights.pop("lm_head.weight", None)
    if out is not None:
        weights["lm_head.weight"] = out
    shape: dict[str, Any] = model.published_config(model.shape)
    pad = layout.first["specials"]
    config = shape | {
        "architectures": [ARCHITECTURES[shape["model_type"]]],
        "vocab_size": layout.size,
        "tie_word_embeddings": out is None,
        "torch_dtype": "float32",
        # None: the defaults would be ids of some user or item
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": pad,
    }
    return {name: w.float() for name, w in weights.items()}, config


def tokenizer_table(vocab: Vocab, layout: Layout) -> dict:
    """tokenizer.json: the words' own, then a special token for each further name."""
    table = json.loads(vocab.tokenizer.to_str())
    table["added_tokens"] += [
        {
            "id": vocab.n_words + at,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for at, name in enumerate(layout.names)
    ]
    # Prompts are complete as they are written: no token is put before or after them.
    return table | {"post_processor": None, "padding": None, "truncation": None}


def tokens_beside(policy: Policy, layout: Layout) -> dict:
    """tokenizer_config.json."""
    template = policy.vocab.template
    chat = {"chat_template": template["template"]} if template else {}
    return chat | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": layout.specials[0],
        "bos_token": None,
        "eos_token": None,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": policy.model.shape.n_ctx,
    }


def refuse_blend(policy: Policy) -> None:
    """Raise PageLLMError for a policy whose states are blended after the last norm."""
    if policy.model.blend is not None:
        raise PageLLMError(
            "this policy began with --pool beside a published or Llama trunk: its states are a "
            "blend with the history's mean item row, which no network of transformers computes\n"
            "  Its embeddings can be exported (--format embeddings), and pagellm serve serves it."
        )


def export_transformers(
    policy: Policy,
    shop: Shop,
    folder: str | Path,
    k: int,
    about: dict[str, Any],
    metrics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the directory, in one go: it appears under its name when it is whole.

    k        slots of a page, for generation_config.json
    about    name, dataset, policy, and inputs: hashes of the policy and of the data
    metrics  metric -> {mean, low, high} on the test split, for the card; None: none was measured
    returns  what pagellm.json holds
    Raises PageLLMError for a policy that transformers has no network for.
    """
    folder = Path(folder)
    refuse_blend(policy)
    policy.check_room(k)
    layout = Layout(policy, shop)
    merged = lora.is_merged(policy.model)
    weights, config = weights_of(policy.model, layout)
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write_weights(beside, weights, config)
    if not merged:
        lora.unmerge(policy.model)
    pad = config["pad_token_id"]
    generation = {
        "do_sample": False,
        "max_new_tokens": k,
        "pad_token_id": pad,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    record = about | {
        "architecture": config["architectures"][0],
        "first": layout.first,
        "specials": layout.specials,
        "n_users": shop.n_users,
        "n_items": shop.n_items,
        "k": k,
        "prompt": asdict(policy.style),
        "gated": policy.model.gate is not None,
        "sha256": sha256(beside / "model.safetensors"),
    }
    table = json.dumps(tokenizer_table(policy.vocab, layout), ensure_ascii=False)
    (beside / "tokenizer.json").write_text(table, encoding="utf-8")
    for name, content in (
        ("tokenizer_config.json", tokens_beside(policy, layout)),
        ("generation_config.json", generation),
        ("pagellm.json", record),
    ):
        write_json(beside / name, content)
    with atomic(beside / "README.md") as card:
        card.write_text(model_card(policy, shop, record, metrics), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    return record


EXAMPLE = '''import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
about = json.loads(Path(folder, "pagellm.json").read_text())

prompt = tokenizer({prompt}, return_tensors="pt", add_special_tokens=False)
first, start = about["first"]["items"], prompt["input_ids"].shape[1]
hidden = {{tokenizer.convert_tokens_to_ids(token) for token in {hidden}}}
legal = [i for i in range(first, first + about["n_items"]) if i not in hidden]


def allowed(batch, ids):
    """The items that the next slot may hold: none that its user has, none twice."""
    placed = set(ids[start:].tolist())
    return [i for i in legal if i not in placed]


page = model.generate(**prompt, prefix_allowed_tokens_fn=allowed)[0, start:]
print(tokenizer.convert_ids_to_tokens(page))'''


def example_prompt(policy: Policy, shop: Shop, layout_names: dict[int, str]) -> tuple[str, list]:
    """The prompt of the first user as text, and the items that his page must not hold."""
    items, ratings = shop.csr(None).of(0)
    tokens = policy.prompts.page(0 if policy.style.use_user else None, items, ratings)
    text = ""
    for named, run in groupby(tokens, key=layout_names.__contains__):
        ids = list(run)
        text += "".join(layout_names[t] for t in ids) if named else policy.vocab.decode(ids)
    met = shop.csr(None, positive=None).of(0)[0]
    return text, [f"<item_{shop.catalogue.ids[i]}>" for i in met]


def model_card(
    policy: Policy, shop: Shop, record: dict[str, Any], metrics: dict[str, Any] | None
) -> str:
    """README.md, with front matter as the hub reads it."""
    vocab, seen = policy.vocab, record["first"].get("seen")
    names = token_names(vocab, shop.user_ids, shop.catalogue.ids, seen is not None)
    of_token = {vocab.n_words + at: name for at, name in enumerate(names)}
    if seen is not None:  # the history's items are read by their other names
        for item in range(vocab.n_items):
            of_token[vocab.item0 + item] = of_token[seen + item]
    prompt, hidden = example_prompt(policy, shop, of_token)
    code = EXAMPLE.format(folder=".", prompt=json.dumps(prompt), hidden=json.dumps(hidden))
    numbers = "No metrics were measured: run `pagellm evaluate` first, then export again."
    if metrics:
        rows = [
            f"| {name} | {row['mean']:.4f} | {row['low']:.4f} to {row['high']:.4f} |"
            for name, row in metrics.items()
            if isinstance(row, dict) and row.get("mean") is not None
        ]
        numbers = "\n".join(["| metric | mean | 95% interval |", "|---|---|---|", *rows])
    twice = (
        "Every item is there twice: `<seen_ID>` in the history, `<item_ID>` on the page. This "
        "policy reads the items of its page through a gate, which the second rows contain.\n\n"
        if seen is not None
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- recommendation
- whole-page-optimisation
- pagellm
---

# {record["name"]}

A policy of PageLLM: it writes a person's page of recommendations, one item a token
(arXiv 2506.09084). It is a {record["architecture"]} whose vocabulary goes on behind
{vocab.n_words:,} words with {shop.n_users:,} users and {shop.n_items:,} items of the data set
`{record["dataset"]}`.

{twice}It learnt from this shop alone and says nothing of others. `<user_ID>` tokens hold the
shop's identifiers of people, and their rows what was learnt of them: think before it is shared.

## Metrics on the test split

{numbers}

## What it was made from

| | |
|---|---|
| policy | {record["policy"]}, `{record["inputs"]["policy"]}` |
| data | `{record["inputs"]["data"]}` (hash of source.json) |
| weights | sha256 `{record["sha256"]}` |

## A page

`generate` knows neither what a user has nor that no item may stand twice, so both are said:

```python
{code}
```
"""
