"""Adapters: a new one changes nothing, merged equals unmerged, unmerging is exact, and nothing
learns that is meant to be frozen.
"""

import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from pagellm import pretrain
from pagellm.model import lora
from pagellm.model.backbone import KVCache
from pagellm.model.networks import build, from_state, load_published, save_published, to_state
from pagellm.model.policy import Policy
from pagellm.model.vocab import Vocab
from pagellm.serving.recommender import Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import load_model_file
from pagellm.stage.train import optimiser
from tests.test_pipeline import SMALL, STAGES

SIZES = {"nano": "q,v,down", "llama-nano": "q,k,v,o,gate,up,down"}
WORDS, SPECIALS, USERS, ITEMS = 20, 9, 5, 12
IDS = torch.randint(
    0, WORDS + SPECIALS + USERS + ITEMS, (3, 11), generator=torch.Generator().manual_seed(0)
)


def make(size, targets=None, seed=0, trained=True):
    torch.manual_seed(seed)
    model = build(size, WORDS + SPECIALS, USERS, ITEMS, dropout=0.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    plain = {name: w.detach().clone() for name, w in model.named_parameters()}
    lora.adapt(model, 4, 8.0, targets or SIZES[size], SPECIALS)
    if trained:
        with torch.no_grad():
            for module in lora.adapters(model):
                module.lora_b.normal_(0, 0.1)
    return model, plain


@pytest.mark.parametrize("size", SIZES)
def test_a_new_adapter_changes_nothing(size):
    model, plain = make(size, trained=False)
    before = build(size, WORDS + SPECIALS, USERS, ITEMS, dropout=0.0)
    before.load_state_dict(plain)
    ids = torch.arange(WORDS + SPECIALS + USERS + ITEMS)
    assert torch.equal(model.embed(ids), before.embed(ids))
    with torch.no_grad():
        assert torch.equal(model(IDS), before(IDS))
        assert torch.equal(model.word_logits(model(IDS)), before.word_logits(before(IDS)))


@pytest.mark.parametrize("size", SIZES)
def test_an_adapter_adds_alpha_over_rank_times_b_a(size):
    """Against the plain network whose matrices had the product added by hand, part by part."""
    model, plain = make(size)
    by_hand = build(size, WORDS + SPECIALS, USERS, ITEMS, dropout=0.0)
    weights = dict(plain)
    for layer, block in enumerate(model.h):
        for target in SIZES[size].split(","):
            path, part, of = model.TARGETS[target]
            folder, last = path.split(".")
            module, name = getattr(getattr(block, folder), last), f"h.{layer}.{path}.weight"
            at = module.parts.tolist().index(part)
            wide = len(plain[name]) // of
            changed = weights[name].clone()
            changed[part * wide : (part + 1) * wide] += (
                8.0 / 4 * module.lora_b[at].detach() @ module.lora_a[at].detach()
            )
            weights[name] = changed
    by_hand.load_state_dict(weights)
    with torch.no_grad():
        assert_close(model(IDS), by_hand(IDS), atol=1e-4, rtol=1e-4)
        assert (model(IDS) - from_state({**to_state(by_hand)})(IDS)).abs().max() < 1e-3
        by_hand.load_state_dict(plain)
        assert (model(IDS) - by_hand(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_merged_equals_unmerged_and_unmerging_is_exact(size):
    model, plain = make(size)
    with torch.no_grad():
        want = model.item_logits(model(IDS))
        before = {name: w.clone() for name, w in model.state_dict().items()}
        lora.merge(model)
        lora.merge(model)  # twice is once
        assert lora.is_merged(model)
        assert_close(model.item_logits(model(IDS)), want, atol=1e-5, rtol=1e-5)
        cache = KVCache(model.shape, 3, 11, model.word)
        assert_close(
            model.item_logits(
                torch.cat([model(IDS[:, :6], None, cache), model(IDS[:, 6:], None, cache)], 1)
            ),
            want,
            atol=1e-5,
            rtol=1e-5,
        )
        with pytest.raises(ValueError, match="unmerge"):
            to_state(model)
        lora.unmerge(model)
        lora.unmerge(model)
        assert not lora.is_merged(model)
        assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
        assert torch.equal(model.item_logits(model(IDS)), want)


@pytest.mark.parametrize("size", SIZES)
def test_only_adapters_and_new_rows_learn(size):
    model, plain = make(size)
    opt = optimiser(model, 0.01, weight_decay=0.1)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    for _ in range(2):
        hidden = model(IDS)
        (
            model.item_logits(hidden).square().mean() + model.word_logits(hidden).square().mean()
        ).backward()
        opt.step()
        opt.zero_grad()
    moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    learns = {name for name in before if name in ("user", "item", "special") or ".lora_" in name}
    assert moved == learns == {name for name, w in model.named_parameters() if w.requires_grad}
    decayed = [w for group in opt.param_groups if group["weight_decay"] for w in group["params"]]
    assert {id(w) for w in decayed} == {
        id(w) for name, w in model.named_parameters() if ".lora_" in name
    }
    # Frozen weights have no moments: that is the memory saved.
    assert sum(len(group["params"]) for group in opt.param_groups) == len(learns) == len(opt.state)
    frozen = {name: w for name, w in model.named_parameters() if name not in learns}
    assert torch.equal(frozen.pop("word"), plain["word"][:WORDS])
    assert all(torch.equal(w, plain[name]) for name, w in frozen.items())
    counted = lora.counts(model)
    assert counted["trainable"] == sum(before[name].numel() for name in learns)
    assert counted["parameters"] == sum(w.numel() for w in before.values())


@pytest.mark.parametrize("size", SIZES)
def test_state_round_trip(size):
    model, _ = make(size)
    again = from_state(to_state(model))
    assert again.lora == model.lora and lora.counts(again) == lora.counts(model)
    assert {n for n, w in again.named_parameters() if w.requires_grad} == {
        n for n, w in model.named_parameters() if w.requires_grad
    }
    with torch.no_grad():
        assert torch.equal(again(IDS), model(IDS))


def test_merged_adapters_are_published_inside_the_matrices(tmp_path):
    model, _ = make("llama-nano")
    lora.merge(model)
    save_published(model, tmp_path, WORDS)
    plain = build("llama-nano", WORDS + SPECIALS, USERS, ITEMS)
    load_published(plain.eval(), tmp_path, WORDS)
    ids = torch.arange(WORDS)[None]
    with torch.no_grad():
        assert_close(plain(ids), model(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="load first"):
        load_published(model, tmp_path, WORDS)


def test_wrong_options_are_refused():
    for targets, message in (
        ("q,w", "no 'w'"),
        ("gat", "did you mean gate"),
        ("q,q", "each once"),
        ("", "want some"),
    ):
        with pytest.raises(PageLLMError, match=message):
            lora.parse_targets(targets, {"q": 0, "gate": 0})
    model = build("llama-nano", WORDS, 1, 1)
    with pytest.raises(PageLLMError, match="lora_rank=16: attn.k_proj is 16 x 32"):
        lora.adapt(model, 16, 8.0, "k", 0)
    with pytest.raises(PageLLMError, match="trunk that knows something"):
        pretrain.Config(lora_rank=4)
    with pytest.raises(PageLLMError, match="no 'gate' in this backbone"):
        pretrain.Config(lora_targets="gate")
    model, _ = make("nano")
    with pytest.raises(ValueError, match="adapters already"):
        lora.adapt(model, 2, 8.0, "q", 0)


@pytest.fixture(scope="module", params=SIZES)
def root(request, served, tmp_path_factory):
    """All stages with a published trunk, its words and adapters, on the shop of `served`."""
    torch.set_num_threads(1)
    root, size = tmp_path_factory.mktemp("lora"), request.param
    (root / "data").symlink_to(served / "data")
    vocab = Vocab.load(served / "runs" / "base" / "pretrain")
    torch.manual_seed(3)
    save_published(
        build(size, vocab.n_words, 0, 0), root / "published", vocab.n_words, shard_mb=0.05
    )
    vocab.save(root / "published")
    for stage in STAGES:
        STAGES[stage].run(config(root, stage, size))
    return root, size


def config(root, stage, size, run="base", **more):
    own = (
        {
            "size": size,
            "weights": str(root / "published"),
            "bpe": str(root / "published" / "tokenizer.json"),
            "lora_rank": 2,
            "lora_targets": SIZES[size],
        }
        if stage == "pretrain"
        else {}
    )
    return STAGES[stage].Config(
        run=run,
        data=str(root / "data"),
        runs=str(root / "runs"),
        device="cpu",
        **SMALL[stage] | {"save_every": 2} | own | more,
    )


def weights(root, stage, run="base"):
    return load_model_file(root / "runs" / run / stage / "model.pt")


def test_every_stage_keeps_adapters_and_frozen_weights(root):
    root, size = root
    published = build(size, 300, 0, 0)
    load_published(published, root / "published")
    states = [weights(root, stage) for stage in ("pretrain", "sft", "reward", "ppo")]
    for state in states:
        assert state["lora"]["rank"] == 2
        for name, weight in published.named_parameters():
            if name not in ("user", "item"):
                assert torch.equal(state["weights"][name], weight), name
    for one, two in (states[:2], states[1:3]):
        for name, weight in one["weights"].items():
            learns = name in ("user", "item", "special") or ".lora_" in name
            assert torch.equal(weight, two["weights"][name]) != learns, name
    record = json.loads((root / "runs" / "base" / "pretrain" / "done").read_text())
    assert 0 < record["trainable"] < record["parameters"] and record["peak_mb"] > 10
    timing = [json.loads(line) for line in open(root / "runs" / "base" / "sft" / "timing.jsonl")]
    assert [row["step"] for row in timing] == list(range(1, len(timing) + 1))
    assert all(row["seconds"] > 0 for row in timing)


def test_the_frozen_trunk_is_on_disk_once_and_each_stage_is_whole_by_itself(root, tmp_path):
    """model.pt holds what learns and the hash of what does not; older files hold both."""
    root, _ = root
    stages = [root / "runs" / "base" / s for s in ("pretrain", "sft", "reward", "ppo")]
    names = {tuple(p.name for p in stage.glob("frozen-*.pt")) for stage in stages}
    ((name,),) = names  # one file, of one name, in each of the four
    assert len({(stage / name).stat().st_ino for stage in stages}) == 1
    for stage in stages:
        kept = torch.load(stage / "model.pt", weights_only=True)
        assert kept["frozen"] == name.removeprefix("frozen-").removesuffix(".pt")
        assert all(lora.learns(n) for n in kept["weights"]) and len(kept["weights"]) > 3
    alone = tmp_path / "sft"
    shutil.copytree(stages[1], alone)
    policy, ids = Policy.load(alone), torch.arange(9)[None]
    whole = load_model_file(alone / "model.pt")
    old = {k: v for k, v in whole.items() if k != "style"}  # as it was written before
    assert "frozen" not in old and "word" in old["weights"]
    with torch.no_grad():
        assert torch.equal(from_state(old)(ids), policy.model(ids))
    raw = bytearray((alone / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (alone / name).write_bytes(raw)
    with pytest.raises(PageLLMError, match=f"{name} is damaged; model.pt needs it"):
        Policy.load(alone)
    (alone / name).unlink()
    with pytest.raises(PageLLMError, match=f"{name} is gone.*\n  Copy it from another stage"):
        Policy.load(alone)
    shutil.copy(stages[0] / name, alone)
    assert Policy.load(alone).model.lora is not None


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_a_stage_that_was_stopped_ends_with_the_same_bytes(root, stage, monkeypatch):
    """Also with the blocks computed anew in the second half: that moves no number."""
    root, size = root
    run = f"again-{stage}"
    for before in [s for s in ("pretrain", "sft", "reward", "ppo") if s != stage]:
        (root / "runs" / run).mkdir(parents=True, exist_ok=True)
        (root / "runs" / run / before).symlink_to(root / "runs" / "base" / before)
    module = STAGES[stage]

    class Stopped(Exception):
        pass

    def save(self, state, keep=module.Run.save):
        keep(self, state)
        if state["step"] == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "save", save)
        with pytest.raises(Stopped):
            module.run(config(root, stage, size, run))
    held = torch.load(root / "runs" / run / stage / "step-00000002.pt", weights_only=True)
    kept = {
        name.removeprefix("model.")
        for name in held[{"pretrain": "both", "ppo": "policy"}.get(stage, "model")]
    }
    # A checkpoint holds what learns; the published trunk and words stay where they were read from.
    assert (
        {"user", "item", "special"} < kept
        and "word" not in kept
        and not any("mlp.up_proj.w" in n for n in kept)
    )
    assert not any(n.endswith(("c_attn.weight", "q_proj.weight")) for n in kept)
    module.run(config(root, stage, size, run, checkpoint_blocks=True))
    done = [json.loads((root / "runs" / r / stage / "done").read_text()) for r in ("base", run)]
    assert done[0]["id"] == done[1]["id"] and done[0]["state"] == done[1]["state"]


def test_pages_are_served_from_merged_weights(root):
    root, _ = root
    rec = Recommender.load(
        Sources(run="base", data=str(root / "data"), runs=str(root / "runs"), device="cpu")
    )
    assert lora.is_merged(rec.policies["ppo"].model)
    policy = Policy.load(root / "runs" / "base" / "ppo")
    prompt, valid = policy.prompt([0, 1], [rec.history.of(u) for u in (0, 1)])
    with torch.no_grad():
        assert_close(
            rec.policies["ppo"].model(prompt, valid),
            policy.model(prompt, valid),
            atol=1e-5,
            rtol=1e-5,
        )
