"""An exported policy in transformers: the same logits, and by `generate` the same pages."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pagellm.data.shop import load
from pagellm.model import lora
from pagellm.model.gpt2 import GPT2
from pagellm.model.gpt2 import Shape as GPT2Shape
from pagellm.model.llama import Llama, Shape
from pagellm.model.policy import Policy, PromptStyle
from pagellm.model.vocab import Vocab
from pagellm.serving import export
from pagellm.serving.transformers_export import export_transformers
from pagellm.stage.config import PageLLMError

K = 6
ABOUT = {"name": "x", "dataset": "synthetic", "policy": "sft"} | {
    "inputs": {"policy": "p", "data": "d"}
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="exports: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def synthetic(served):
    return load(served / "data" / "synthetic")


def random_policy(served, shop, kind):
    """A policy far from its start, of one of the kinds that there are."""
    vocab = Vocab.load(served / "runs" / "base" / "sft")
    llamas = {
        "llama": {},
        "llama, adapters": {"theta": 300.0, "scaling": (8.0, 1.0, 4.0, 16)},
        "qwen2, words scored apart": {"qkv_bias": True, "tied": False},
        "qwen3": {"qk_norm": True, "n_head_dim": 12},
        "llama, pooled": {},
        "llama, pooled, adapters": {"tied": False},
    }
    if kind in llamas:
        trunk, shape = Llama, Shape(2, 4, 2, 32, 56, 128, **llamas[kind])
    else:
        trunk, shape = GPT2, GPT2Shape(2, 2, 32, 128)
    sizes = (vocab.n_words + vocab.n_specials, shop.n_users, shop.n_items)
    torch.manual_seed(0)
    model = trunk(shape, *sizes, dropout=0.0)
    if "gated" in kind:
        model.add_gate()
    if "pooled" in kind:
        model.add_pool()
    if "adapters" in kind:
        lora.adapt(model, 2, 4.0, "q,v", vocab.n_specials)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    return Policy(model.eval(), vocab, PromptStyle(8, use_user="no user" not in kind))


KINDS = (
    "gpt2",
    "gpt2, gated",
    "gpt2, gated, adapters, no user",
    "llama",
    "llama, adapters",
    "qwen2, words scored apart",
    "qwen3",
)


def opened(transformers, folder):
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def test_the_prompts_of_the_documentation_are_the_policys_own(
    served, synthetic, tmp_path, transformers
):
    """A stranger's page by the lines of the tutorial is the page that `recommend` writes."""
    policy = random_policy(served, synthetic, "gpt2")
    export_transformers(policy, synthetic, tmp_path / "out", K, ABOUT)
    _, tokenizer = opened(transformers, tmp_path / "out")
    docs = Path(__file__).parents[2] / "docs"
    (typed,) = re.findall(r'tokenizer\("([^"]+)"', (docs / "tutorial" / "stories.md").read_text())
    assert f"`{typed}`" in (docs / "how-to" / "hugging-face.md").read_text()
    assert tokenizer(typed)["input_ids"] == policy.prompts.page(None, [], [])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_pages_are_the_policys_own(
    served, synthetic, tmp_path, kind, transformers
):
    """Left-padded prompts of several users; a page from the ids alone, as `generate` writes it."""
    policy, shop = random_policy(served, synthetic, kind), synthetic
    made = export_transformers(policy, shop, tmp_path / "out", K, ABOUT)
    theirs, tokenizer = opened(transformers, tmp_path / "out")
    assert not lora.is_merged(policy.model)
    users, history, met = np.arange(5), shop.csr(None), shop.csr(None, positive=None)
    prompt, valid = policy.prompt(users, [history.of(u) for u in users])
    pages, _ = policy.write(users, history, met, K)
    item0, P = policy.vocab.item0, prompt.shape[1]
    assert made["first"]["items"] == item0
    # the history's items by their other names, where the policy is gated
    moved = prompt
    if made["gated"]:
        at_item = (prompt >= item0) & valid
        moved = torch.where(at_item, prompt - item0 + made["first"]["seen"], prompt)
    ids = torch.cat([moved, pages.item + item0], 1)
    read = torch.cat([valid, pages.mask], 1)
    position = (read.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = theirs(ids, attention_mask=read.long(), position_ids=position).logits[:, P - 1 :]
        ours = policy.model(torch.cat([prompt, pages.item + item0], 1), read, placed=P)[:, P - 1 :]
        wanted = policy.model.item_logits(ours)
        scale = wanted.abs().max().clamp(min=1.0)
        assert (got[..., item0 : item0 + shop.n_items] - wanted).abs().max() < 1e-5 * scale
        words = policy.model.word_logits(ours)
        assert (got[..., : words.shape[-1]] - words).abs().max() < 1e-5 * scale
    legal = [set(range(shop.n_items)) - set(met.of(u)[0].tolist()) for u in users]

    def allowed(batch, ids):
        placed = set(ids[P:].tolist())
        return [i + item0 for i in sorted(legal[batch]) if i + item0 not in placed]

    written = theirs.generate(
        input_ids=moved, attention_mask=valid.long(), prefix_allowed_tokens_fn=allowed
    )
    assert torch.equal(written[:, P:], pages.item + item0)
    name = tokenizer.convert_ids_to_tokens(int(written[0, P]))
    assert name == f"<item_{shop.catalogue.ids[int(pages.item[0, 0])]}>"


@pytest.mark.parametrize("kind", ["gpt2", "gpt2, gated"])
def test_the_code_of_the_card_writes_the_page(
    served, synthetic, tmp_path, kind, transformers, monkeypatch, capsys
):
    policy, shop = random_policy(served, synthetic, kind), synthetic
    metrics = {"Recall@20": {"mean": 0.5, "low": 0.25, "high": 0.75}, "note": None}
    export_transformers(policy, shop, tmp_path / "out", K, ABOUT, metrics)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Recall@20 | 0.5000 | 0.2500 to 0.7500 |" in card and "`d`" in card
    monkeypatch.chdir(tmp_path / "out")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    met = shop.csr(None, positive=None)
    pages, _ = policy.write(np.array([0]), shop.csr(None), met, K)
    wanted = [f"<item_{shop.catalogue.ids[i]}>" for i in pages.item[0].tolist()]
    assert str(wanted) in capsys.readouterr().out


def test_the_tokeniser_reads_prompts_and_names_every_token(
    served, synthetic, tmp_path, transformers
):
    """No token stands before or behind a text; a published <pad> keeps its own meaning."""
    policy, shop = random_policy(served, synthetic, "llama"), synthetic
    table = json.loads(policy.vocab.tokenizer.to_str())
    for word in ("<pad>", "<end>"):
        table["added_tokens"].append(
            {"id": policy.vocab.n_words + len(table["added_tokens"]), "content": word}
            | {"special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    vocab = Vocab.published(tmp_path / "tokenizer.json", shop.n_users, shop.n_items)
    sizes = (vocab.n_words + vocab.n_specials, shop.n_users, shop.n_items)
    policy = Policy(Llama(policy.model.shape, *sizes), vocab, policy.style)
    export_transformers(policy, shop, tmp_path / "out", K, ABOUT)
    theirs, tokenizer = opened(transformers, tmp_path / "out")
    assert len(tokenizer) == theirs.config.vocab_size == vocab.size
    text = f"<user_{shop.user_ids[3]}> history<item_{shop.catalogue.ids[2]}><r5><page>"
    wanted = policy.prompts.page(3, np.array([2]), np.array([5.0]))
    assert tokenizer(text)["input_ids"] == wanted
    assert tokenizer.decode(wanted) == text
    assert tokenizer.pad_token_id == vocab.pad == theirs.generation_config.pad_token_id
    assert tokenizer.convert_ids_to_tokens(vocab.pad) == "<pagellm_pad>"
    assert tokenizer("Blue <pad> drum?")["input_ids"][1:2] != [vocab.pad]
    for end in (theirs.config.eos_token_id, theirs.generation_config.eos_token_id):
        assert end is None  # GPT-2's default would be some user


def test_the_command_says_what_it_wrote_and_takes_metrics_of_this_policy_alone(
    served, tmp_path, capsys
):
    runs = tmp_path / "runs"
    shutil.copytree(served / "runs" / "base" / "sft", runs / "base" / "sft")
    options = {"run": "base", "data": str(served / "data"), "runs": str(runs), "device": "cpu"}
    config = export.Config(**options, format="transformers", k=K)
    export.run(config)
    out = runs / "base" / "transformers-sft"
    record = json.loads((out / "pagellm.json").read_text())
    done = json.loads((runs / "base" / "sft" / "done").read_text())
    assert record["inputs"]["policy"] == done["id"] and record["k"] == K
    assert "no metrics in its card" in capsys.readouterr().out
    for policy, found in ((done["id"], True), ("other", False)):
        folder = runs / "base" / "evaluate"
        folder.mkdir(exist_ok=True)
        for name, value in (
            ("done", {}),
            ("config.json", {"inputs": {"sft": policy}, "config": {"split": "test"}}),
            ("metrics.json", {"sft": {"NDCG@100": {"mean": 0.3, "low": 0.2, "high": 0.4}}}),
        ):
            (folder / name).write_text(json.dumps(value))
        export.run(config)
        assert ("NDCG@100 | 0.3000" in (out / "README.md").read_text()) == found
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(PageLLMError, match="holds something else"):
        export.run(export.Config(**options, format="transformers", out=str(tmp_path / "mine")))
    with pytest.raises(PageLLMError, match="format='onnx': want embeddings, transformers"):
        export.Config(format="onnx")


def test_two_tokens_of_one_name_are_refused(served, synthetic, tmp_path):
    policy = random_policy(served, synthetic, "gpt2")
    shop = load(served / "data" / "synthetic")
    shop.catalogue.ids[1] = shop.catalogue.ids[0]
    with pytest.raises(PageLLMError, match="would stand twice"):
        export_transformers(policy, shop, tmp_path / "out", K, ABOUT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gpt2, pooled", "llama, pooled", "llama, pooled, adapters"])
def test_a_blend_after_the_last_norm_is_refused_before_anything_is_written(
    served, synthetic, tmp_path, kind
):
    """A published GPT-2 has the blend too; the gate that comes with it is no excuse."""
    policy = random_policy(served, synthetic, kind)
    assert policy.model.gate is not None
    with pytest.raises(PageLLMError, match="no network of transformers computes"):
        export_transformers(policy, synthetic, tmp_path / "out", K, ABOUT)
    assert not list(tmp_path.iterdir())
    policy.model.blend = None
    export_transformers(policy, synthetic, tmp_path / "out", K, ABOUT)


def test_weights_written_are_those_that_are_read(served, synthetic, tmp_path):
    """Our own loader takes the trunk and the words of an export back."""
    from pagellm.model.networks import build, load_published, published_shape

    policy = random_policy(served, synthetic, "qwen3")
    export_transformers(policy, synthetic, tmp_path / "out", K, ABOUT)
    model = build(published_shape(tmp_path / "out"), policy.vocab.size, 0, 0, 0.0).eval()
    load_published(model, tmp_path / "out")
    ids = torch.tensor([[1, 5, policy.vocab.page, policy.vocab.item0 + 3]])
    with torch.no_grad():
        assert_close(model(ids), policy.model(ids))
