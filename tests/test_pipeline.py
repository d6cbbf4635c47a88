"""Every stage on a tiny shop: from raw reviews to one served page; resume, refusals, and the
studies on top.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from experiments import ablation
from pagellm import evaluate, ppo, ppo_setup, pretrain, reward, sft
from pagellm.data import prepare
from pagellm.data.shop import load
from pagellm.model import corpus, page_loss
from pagellm.model.decode import LegalItems, greedy
from pagellm.model.policy import Policy, Validation
from pagellm.model.prompts import Prompts
from pagellm.model.reward_model import RewardModel
from pagellm.model.vocab import Vocab
from pagellm.pages import ranked, truth
from pagellm.pages.ranked import label_ranks
from pagellm.stage.config import PageLLMError

SMALL = {
    "pretrain": {
        "size": "nano",
        "steps": 6,
        "batch": 8,
        "rating_batch": 8,
        "words": 300,
        "warmup": 2,
    },
    "sft": {"epochs": 2, "batch": 16, "eval_every": 4, "max_history": 8, "warmup": 2, "k": 6},
    "reward": {"per_kind": 1, "epochs": 1, "batch": 32, "warmup": 2},
    "ppo": {
        "epochs": 1.0,
        "rollout": 16,
        "minibatch": 8,
        "micro": 4,
        "inner_epochs": 2,
        "k": 6,
        "eval_every": 2,
        "critic_warmup": 4,
        "lr": 1e-3,
        "min_steps": 1,
        "force": True,
        "gate_users": 10,
    },
    "evaluate": {"k": 6, "depth": 40, "n_boot": 50, "examples": 1},
}
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}


def config(root, stage, run="base", **more):
    return STAGES[stage].Config(
        run=run,
        data=str(root / "data"),
        runs=str(root / "runs"),
        device="cpu",
        **SMALL[stage] | {"save_every": 2} | more,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A shop of 60 users and 50 items, and one run through all stages."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pipeline")
    prepare.run(prepare.Config(data=str(root / "data"), users=80, items=60))
    for stage in STAGES:
        STAGES[stage].run(config(root, stage))
    return root


def test_every_stage_leaves_what_the_next_one_reads(root):
    runs = root / "runs" / "base"
    for stage in STAGES:
        assert json.loads((runs / stage / "done").read_text())["seconds"] >= 0
        assert not list((runs / stage).glob("**/.*")) and not list((runs / stage).glob("step-*"))
    log = [json.loads(line) for line in open(runs / "ppo" / "log.jsonl")]
    assert [row["step"] for row in log] == list(range(len(log)))
    assert pq.read_table(runs / "reward" / "pairs.parquet").num_rows > 0
    assert (runs / "evaluate" / "table.txt").read_text().count("Recall@20") == 1
    assert sum(1 for _ in open(runs / "ppo" / "samples.jsonl")) > 0


def test_ppo_logs_what_the_recipe_names(root):
    row = json.loads(open(root / "runs" / "base" / "ppo" / "log.jsonl").readlines()[-1])
    for name in (
        "objective/kl_seq_sum",
        "objective/kl_exact_per_item",
        "objective/entropy",
        "objective/reward_total",
        "objective/reward_page",
        "objective/reward_token",
        "objective/rlhf_reward",
        "policy/approxkl_k1",
        "policy/approxkl_k2",
        "policy/approxkl_k3",
        "policy/clipfrac",
        "policy/clipfrac_low",
        "policy/clipfrac_high",
        "policy/ratio_mean",
        "policy/ratio_var",
        "policy/ratio_max",
        "policy/entropy",
        "policy/grad_norm",
        "val/loss",
        "val/clipfrac",
        "val/explained_var",
        "val/mean",
        "returns/mean",
        "returns/std",
        "returns/min",
        "returns/max",
        "advantages/mean",
        "advantages/std",
        "rnorm/mean",
        "rnorm/std",
        "rnorm/count",
        "kl_coef",
        "lr",
        "rollout/invalid",
        "rollout/duplicate",
        "rollout/gen_vs_train_logp_diff",
        "rollout/first_epoch_max_abs_logratio",
        "list/ILD",
        "list/category_entropy",
        "list/coverage",
        "list/top1_item_share",
        "list/distinct",
        "valid/Recall@20",
        "valid/NDCG@100",
        "valid/energy",
        "alarms",
    ):
        assert name in row, name
    assert row["rollout/invalid"] == row["rollout/duplicate"] == 0
    assert (
        row["rollout/first_epoch_max_abs_logratio"] < 1e-5
        and row["rollout/gen_vs_train_logp_diff"] < 1e-4
    )
    assert row["advantages/mean"] == pytest.approx(0, abs=1e-5) and row[
        "advantages/std"
    ] == pytest.approx(1, abs=1e-4)
    sample = json.loads(open(root / "runs" / "base" / "ppo" / "samples.jsonl").readline())
    assert len(sample["page"]) == len(sample["token_reward"]) == len(sample["kl"])


def test_pages_are_legal_and_scored_from_the_file(root):
    shop = load(root / "data" / "synthetic")
    train = shop.csr(("train", "valid"), positive=None)
    for policy in ("popularity", "sft", "ppo"):
        folder = root / "runs" / "base" / "evaluate" / policy
        pages = pq.read_table(folder / "pages.parquet").to_pydict()
        seen = set()
        for user, item in zip(pages["user"], pages["item"], strict=True):
            assert (user, item) not in seen and item not in train.of(user)[0]
            seen.add((user, item))
        scores = pq.read_table(folder / "per_user.parquet")
        assert scores.num_rows == len(set(pages["user"])) and "true_energy" in scores.column_names
    results = json.loads((root / "runs" / "base" / "evaluate" / "metrics.json").read_text())
    mean = results["ppo"]["NDCG@100"]["mean"] - results["sft"]["NDCG@100"]["mean"]
    assert results[evaluate.DIFFERENCE]["NDCG@100"]["mean"] == pytest.approx(mean)


def test_one_page_served_from_memory(root):
    """A user the model has never met, a history typed by hand: one legal page."""
    policy = Policy.load(root / "runs" / "base" / "ppo")
    prompt, valid = policy.prompt([None], [(np.array([3, 5]), np.array([5.0, np.nan]))])
    pages = greedy(
        policy.model, prompt, valid, LegalItems(torch.tensor([[3, 5]]), policy.model.n_items), 6
    )
    assert pages.mask.all() and len(set(pages.item[0].tolist()) | {3, 5}) == 8
    judge = RewardModel.load(root / "runs" / "base" / "reward")
    with torch.no_grad():
        token, page = judge(prompt, valid, pages.item, pages.mask)
    assert token.isfinite().all() and page.isfinite().all()


class Unplugged(BaseException):
    pass


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_run_that_was_cut_short_ends_bit_identical(root, tmp_path, monkeypatch, stage):
    """Pull the plug after the first checkpoint; the same command ends with the same bytes."""
    shutil.copytree(root / "data", tmp_path / "data")
    whole = root / "runs" / "base"
    (tmp_path / "runs" / "base").mkdir(parents=True)
    for earlier in STAGES:
        if earlier == stage:
            break
        shutil.copytree(whole / earlier, tmp_path / "runs" / "base" / earlier)
    from pagellm.stage.run import Run

    save = Run.save

    def save_and_die(self, state):
        save(self, state)
        self.log(state["step"] + 1, loss=0.0)  # a line past the checkpoint, to be cut
        raise Unplugged

    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(Unplugged):
        STAGES[stage].run(config(tmp_path, stage))
    monkeypatch.setattr(Run, "save", save)
    assert not (tmp_path / "runs" / "base" / stage / "done").exists()
    STAGES[stage].run(config(tmp_path, stage))
    for name in ("model.pt", "log.jsonl", "samples.jsonl"):
        if (whole / stage / name).exists():
            assert (whole / stage / name).read_bytes() == (
                tmp_path / "runs" / "base" / stage / name
            ).read_bytes(), name


def test_done_stages_are_not_run_again(root, capsys):
    for stage in ("pretrain", "sft", "reward", "ppo"):
        before = (root / "runs" / "base" / stage / "done").stat().st_mtime_ns
        STAGES[stage].run(config(root, stage))
        assert f"{stage}: already done" in capsys.readouterr().out
        assert (root / "runs" / "base" / stage / "done").stat().st_mtime_ns == before
    evaluate.run(config(root, "evaluate"))
    assert "Recall@20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stage, missing",
    [
        ("sft", "pre-trained model"),
        ("reward", "SFT policy"),
        ("ppo", "SFT policy"),
        ("evaluate", "policy"),
    ],
)
def test_a_missing_stage_is_named_with_its_command(root, stage, missing):
    with pytest.raises(PageLLMError, match=f"(?s){missing}.*Make it with: make "):
        STAGES[stage].run(config(root, stage, run="nobody"))


def test_changed_options_are_refused_and_missing_data_named(root, tmp_path):
    with pytest.raises(PageLLMError, match="kl_coef=0.1, now kl_coef=0.5"):
        ppo.run(config(root, "ppo", kl_coef=0.5))
    with pytest.raises(PageLLMError, match="no prepared data in .*\n.*make prepare DATASET=toys"):
        pretrain.run(config(tmp_path, "pretrain", dataset="toys"))
    with pytest.raises(PageLLMError, match="tokens, the context has 256"):
        own = config(root, "ppo", run="long", source_run="base", k=237)
        ppo.run(own)


@pytest.mark.parametrize(
    "algo, more",
    [
        ("reinforce", {"inner_epochs": 1}),
        ("rloo", {"samples": 4, "critic_warmup": ppo.Config.critic_warmup}),  # without a critic
    ],
)
def test_other_algorithms_run(root, algo, more):
    own = config(
        root, "ppo", run=f"base-{algo}", source_run="base", algo=algo, kl_target=2.0, **more
    )
    ppo.run(own)
    assert (root / "runs" / f"base-{algo}" / "ppo" / "done").exists()


@pytest.mark.parametrize(
    "more", [{}, {"w_hit": 1.0, "sft_coef": 0.5}], ids=["paper", "hits and SFT"]
)
def test_micro_batches_move_nothing(root, more):
    for micro in (3, 16):
        ppo.run(
            config(
                root,
                "ppo",
                run=f"micro-{micro}-{len(more)}",
                source_run="base",
                micro=micro,
                epochs=0.5,
                critic_warmup=0,
                **more,
            )
        )
    files = [root / "runs" / f"micro-{m}-{len(more)}" / "ppo" / "model.pt" for m in (3, 16)]
    a, b = (torch.load(file, weights_only=True)["weights"] for file in files)
    start = torch.load(root / "runs" / "base" / "sft" / "model.pt", weights_only=True)["weights"]
    moved = max((a[n] - start[n]).abs().max() for n in a)
    apart = max((a[n] - b[n]).abs().max() for n in a)
    assert apart < 0.05 * moved or moved == 0


def test_hits_and_sfts_loss_keep_to_what_a_page_may_hold(root, monkeypatch):
    """Hidden items may be on a page, disliked ones not; SFT's pages are cut; a page without a slot
    ends no run.
    """
    disliked = load(root / "data" / "synthetic").csr("train", positive=False)
    page_batch, roll_out, asked, seen = ppo_setup.page_batch, ppo.roll_out, [], []

    def asking(policy, users, examples, when=None):
        asked.append((np.array(users), [page for _, page in examples]))
        return page_batch(policy, users, examples, when)

    def rolling(*args):
        r = roll_out(*args)
        r.mask[0], r.item[0] = False, -1  # as if nothing had been left for this one
        seen.append(r)
        return r

    monkeypatch.setattr(ppo_setup, "page_batch", asking)
    monkeypatch.setattr(ppo, "roll_out", rolling)
    ppo.run(
        config(
            root,
            "ppo",
            run="hits",
            source_run="base",
            w_hit=1.0,
            sft_coef=1.0,
            label_share=0.5,
            micro=1,
            max_page=2,
            critic_warmup=0,
        )
    )
    held = 0
    for (users, pages), r in zip(asked, seen, strict=False):
        for row, (user, page) in enumerate(zip(users, pages, strict=True)):
            excluded = set(r.excluded[row].tolist())
            assert set(disliked.of(user)[0]) <= excluded and not set(page) & excluded
            held += len(disliked.of(user)[0])
        assert r.sft.item.shape[1] <= 2
    assert held
    log = [json.loads(line) for line in open(root / "runs" / "hits" / "ppo" / "log.jsonl")]
    losses = [row["policy/sft_loss"] for row in log if "policy/sft_loss" in row]
    assert (
        losses
        and np.isfinite(
            losses + [row["policy/grad_norm"] for row in log if "policy/grad_norm" in row]
        ).all()
    )
    model, zero = Policy.load(root / "runs" / "base" / "sft").model, torch.zeros(r.mask.shape)
    learner = SimpleNamespace(policy=model, critic=lambda *_: zero)
    plain, more = (
        ppo.minibatch_loss(
            learner, ppo.Config(sft_coef=c), r, torch.arange(len(r)), zero, zero, True
        )[0]
        for c in (0.0, 3.0)
    )
    nats = page_loss.sft_loss(model, r.sft, "both") * r.sft.mask.sum()
    assert nats > 0 and (more - plain).item() == pytest.approx(
        3.0 * nats.item() / r.mask.sum().item(), rel=1e-4
    )
    samples = [json.loads(line) for line in open(root / "runs" / "hits" / "ppo" / "samples.jsonl")]
    train = load(root / "data" / "synthetic").csr("train").counts()
    users = load(root / "data" / "synthetic").user_ids
    assert all(len(row["history"]) < train[list(users).index(row["user"])] for row in samples)


def test_a_weak_reward_model_draws_a_warning_and_is_no_condition(root, tmp_path, capsys):
    weak = {
        "held_out": {"ranked": {"accuracy": 0.55}, "pairs": 3, "preference": {"accuracy": 0.99}}
    }
    for strict in (False, True):
        ppo_setup.warn_of_weak_pairs(config(root, "ppo", strict=strict), weak, tmp_path)
        said = capsys.readouterr().err
        assert "ranked 0.550" in said and "pairs.parquet" in said and "preference" not in said


def test_sft_learns_exact_pages_by_heart(root):
    """32 users, one fixed split: the loss falls until decoding returns the ground-truth pages
    themselves.
    """
    shop = load(root / "data" / "synthetic")
    policy = Policy.load(root / "runs" / "base" / "sft")
    maker = truth.PageMaker(shop)
    users = maker.users[:32]
    examples = [maker.example(u, 0.3, np.random.default_rng(int(u)), 6) for u in users]
    batch = page_loss.page_batch(policy, users, examples)
    opt = torch.optim.Adam(policy.model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = page_loss.sft_loss(policy.model, batch)
        opt.zero_grad()
        loss.backward()
        opt.step()
    pages = greedy(
        policy.model,
        batch.prompt,
        batch.valid,
        LegalItems(batch.excluded, shop.n_items),
        batch.item.shape[1],
    )
    assert loss < 0.1
    assert torch.equal(pages.item[batch.mask], batch.item[batch.mask])


def test_prompt_tokens_do_not_choose_the_targets(root):
    """Label-only loss: another history moves the loss, never which tokens are scored."""
    shop = load(root / "data" / "synthetic")
    policy, maker = Policy.load(root / "runs" / "base" / "sft"), truth.PageMaker(shop)
    examples = [maker.example(u, 0.3, np.random.default_rng(0)) for u in maker.users[:3]]
    batch = page_loss.page_batch(policy, maker.users[:3], examples)
    other = page_loss.page_batch(policy, maker.users[3:6], examples)
    assert torch.equal(batch.item, other.item) and torch.equal(batch.mask, other.mask)
    assert page_loss.sft_loss(policy.model, batch) != page_loss.sft_loss(policy.model, other)


def test_labels_never_reach_their_own_prompt(root):
    shop = load(root / "data" / "synthetic")
    maker = truth.PageMaker(shop)
    train = shop.csr("train")
    for user in maker.users[:20]:
        (items, _), page = maker.example(user, 0.5, np.random.default_rng(int(user)))
        assert not set(items) & set(page) and set(items) | set(page) <= set(train.of(user)[0])


def test_label_ranks_share_a_rank_where_labels_are_equal():
    ranks = label_ranks(
        np.array([0, 0, 0, 1, 1, 1]),
        np.array([4, 5, 4, np.nan, np.nan, 5]),
        np.array([3.0, 1, 3, np.nan, 2, 1]),
    )
    assert ranks.tolist() == [2.5, 1.0, 2.5, 3.0, 2.0, 1.0]


def test_validation_users_do_not_change(root):
    shop = load(root / "data" / "synthetic")
    a, b = (Validation(shop, "valid", 6, "greedy", 10, seed=3).users for _ in range(2))
    assert np.array_equal(a, b) and len(a) == 10
    policy = Policy.load(root / "runs" / "base" / "sft")
    v = Validation(shop, "valid", 6, "greedy", 10, seed=3)
    assert v(policy) == v(policy)


def test_a_refit_needs_no_validation_rows_and_keeps_the_last_step(root, tmp_path):
    prepare.run(prepare.Config(data=str(tmp_path / "data"), users=80, items=60, refit=True))
    pretrain.run(config(tmp_path, "pretrain"))
    with pytest.raises(PageLLMError, match="(?s)nothing to validate on.*--select last"):
        sft.run(config(tmp_path, "sft"))
    sft.run(config(tmp_path, "sft", select="last"))
    done = json.loads((tmp_path / "runs" / "base" / "sft" / "done").read_text())
    log = [json.loads(line) for line in open(tmp_path / "runs" / "base" / "sft" / "log.jsonl")]
    assert done["step"] == log[-1]["step"] and done["valid_ndcg"] is None
    assert not any(name.startswith("valid/") for row in log for name in row)
    evaluate.run(config(tmp_path, "evaluate", policies="sft", quiet=True))
    mine, plain = (load(r / "data" / "synthetic").csr("test") for r in (tmp_path, root))
    assert np.array_equal(mine.items, plain.items)


def test_the_last_step_is_kept_when_asked_for_however_it_validates(root):
    shutil.copytree(root / "runs" / "base" / "pretrain", root / "runs" / "last" / "pretrain")
    # A learning rate that ruins the network: validation would keep step 0.
    sft.run(config(root, "sft", run="last", select="last", lr=5.0))
    done = json.loads((root / "runs" / "last" / "sft" / "done").read_text())
    log = [json.loads(line) for line in open(root / "runs" / "last" / "sft" / "log.jsonl")]
    scores = [row["valid/NDCG@100"] for row in log if "valid/NDCG@100" in row]
    assert done["step"] == log[-1]["step"] and done["valid_ndcg"] == scores[-1] < max(scores)


def test_the_ablation_runs_its_rows_once(root, capsys):
    short = SMALL | {"ppo": SMALL["ppo"] | {"epochs": 0.4, "eval_every": 10}}
    own = ablation.Config(
        data=str(root / "data"),
        runs=str(root / "runs"),
        seeds=2,
        **{
            s: " ".join(f"--{k} {v}" for k, v in (short[s] | {"device": "cpu"}).items())
            for s in STAGES
        },
    )
    records = ablation.run(own)
    assert {r["variant"] for r in records} == {"mixed", "item-only", "page-only", "without reward"}
    table = pq.read_table(root / "runs" / "ablation" / "synthetic-table5.parquet").to_pylist()
    assert len(table) == len(records) and all(
        r["difference"] == 0 for r in table if r["variant"] == "mixed"
    )
    stamp = {p: p.stat().st_mtime_ns for p in (root / "runs" / "ablation").glob("**/done")}
    assert len(stamp) == 2 * (3 + 1 + 3 * 2)
    ablation.run(own)
    assert all(p.stat().st_mtime_ns == at for p, at in stamp.items())
    assert "item-only" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="--ppo must not set seed"):
        ablation.run(dataclasses.replace(own, ppo="--seed 4"))


def test_the_ablation_fits_an_outcome_model_where_one_pays(root):
    """One for each seed, read by the rows whose slots it pays."""
    short = SMALL | {"ppo": SMALL["ppo"] | {"epochs": 0.4, "eval_every": 10}}
    options = {
        s: " ".join(f"--{k} {v}" for k, v in (short[s] | {"device": "cpu"}).items()) for s in STAGES
    }
    options["ppo"] += " --item_reward outcome"
    ablation.run(
        ablation.Config(
            data=str(root / "data"),
            runs=str(root / "runs"),
            study="paid",
            seeds=1,
            compose="--folds 1 --networks 1 --k 6 --depth 40",
            **options,
        )
    )
    models = list((root / "runs" / "paid").glob("*/compose/model.pt"))
    assert [path.parent.parent.name for path in models] == ["synthetic-s0"]
    for row, reads in (("mixed", True), ("item-only", True), ("page-only", False)):
        run = root / "runs" / "paid" / f"synthetic-s0-{row}"
        said = json.loads((run / "ppo" / "config.json").read_text())
        assert ("compose" in said["inputs"]) == reads, row


def test_pages_begin_as_the_factorisation_and_learn_on(root):
    """rows=als with pool, through all stages; before any step SFT ranks as mean rows do, and beats
    random rows.
    """
    more = {"rows": "als", "pool": True, "steps": 0}
    STAGES["pretrain"].run(config(root, "pretrain", "pooled", **more))
    for stage in ("sft", "reward", "ppo", "evaluate"):
        slow = {"row_lr": 0.1} if stage in ("sft", "ppo") else {}
        STAGES[stage].run(config(root, stage, "pooled", **slow))
    first = json.loads(open(root / "runs" / "pooled" / "sft" / "log.jsonl").readline())
    assert first["step"] == 0
    STAGES["pretrain"].run(config(root, "pretrain", "random", rows="random", steps=0))
    STAGES["sft"].run(config(root, "sft", "random", epochs=1))
    other = json.loads(open(root / "runs" / "random" / "sft" / "log.jsonl").readline())
    assert first["valid/NDCG@100"] > 1.2 * other["valid/NDCG@100"]
    trunk = RewardModel.load(root / "runs" / "pooled" / "reward").trunk
    assert trunk.gate.mean() > 0.9


def test_a_large_catalogue_is_ranked_in_smaller_blocks_to_the_same_pages(root, monkeypatch):
    shop, policy = load(root / "data" / "synthetic"), Policy.load(root / "runs" / "base" / "sft")
    history, seen, users = (
        shop.csr("train"),
        shop.csr("train", positive=None),
        np.arange(shop.n_users),
    )

    def both():
        return (
            policy.rank(users, history, seen, 6, 20).item,
            ranked.popularity_pages(shop, users, seen, 6, 20).item,
        )

    whole, batches = both(), []
    write = policy.write
    monkeypatch.setattr(
        policy,
        "write",
        lambda some, *rest, **more: batches.append(len(some)) or write(some, *rest, **more),
    )
    for module in ("model.policy", "pages.ranked"):
        monkeypatch.setattr(f"pagellm.{module}.BLOCK", 7 * shop.n_items)
    blocks = both()
    assert max(batches) == 7 and all(
        np.array_equal(a, b) for a, b in zip(whole, blocks, strict=True)
    )


def test_a_run_with_drawn_items_and_lazy_rows_goes_on_to_the_same_bits(root):
    """Draws are keyed by step and a row's own count of steps is in the checkpoint."""
    lean = {"sampled_items": 12, "lazy_rows": True}
    for stage, more in (("pretrain", lean), ("sft", lean), ("reward", {"lazy_rows": True})):
        module, runs = STAGES[stage], root / "runs"
        for name in ("lean", "lean2"):
            one = config(root, stage, name, **more)
            if name == "lean":
                module.run(one)
                continue
            with pytest.MonkeyPatch.context() as patch:
                save = module.Run.save

                def stop(self, state, save=save):
                    save(self, state)
                    raise KeyboardInterrupt

                patch.setattr(module.Run, "save", stop)
                with pytest.raises(KeyboardInterrupt):
                    module.run(one)
            module.run(one)
        states = [
            json.loads((runs / name / stage / "done").read_text())["state"]
            for name in ("lean", "lean2")
        ]
        assert states[0] == states[1], stage
        assert states[0] != json.loads((runs / "base" / stage / "done").read_text())["state"]


def test_texts_are_read_from_their_tokens_on_disk(root, tmp_path):
    """Every example is what its text says; a corpus that is there is not written again; none is
    left behind.
    """
    shop = load(root / "data" / "synthetic")
    vocab = Vocab.load(root / "runs" / "base" / "pretrain")
    prompts = Prompts(vocab, 64)
    made = corpus.Corpus(shop, prompts, False, tmp_path / "tokens")
    said = [
        (kind, row)
        for kind, rows in (
            ("contents", corpus.catalogue_texts(shop.catalogue)),
            ("first_order", corpus.review_texts(shop)),
        )
        for row in rows
    ]
    assert len(said) == len(made.contents) + len(made.reviews) == len(made.tokens.start) - 1 > 100
    for i, (kind, row) in enumerate(said):
        got = (
            prompts.contents(*made.contents[i], made.tokens[i])
            if kind == "contents"
            else prompts.first_order(*made.reviews[i - len(made.contents)].tolist(), made.tokens[i])
        )
        assert got == getattr(prompts, kind)(*row)
    assert isinstance(made.tokens.ids, np.memmap)
    before = (tmp_path / "tokens" / "ids.npy").stat().st_mtime_ns
    corpus.Corpus(shop, prompts, False, tmp_path / "tokens")
    assert (tmp_path / "tokens" / "ids.npy").stat().st_mtime_ns == before
    assert not (root / "runs" / "base" / "pretrain" / "tokens").exists()
    corpus.Tokens.write(tmp_path / "none", [])
    assert len(corpus.Tokens(tmp_path / "none").start) == 1


def test_half_an_epoch_of_sft_is_half_its_steps(served, tmp_path):
    shutil.copytree(served / "runs" / "base" / "pretrain", tmp_path / "base" / "pretrain")
    for epochs, name in ((1.0, "whole"), (0.5, "half")):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        sft.run(
            sft.Config(
                run=name,
                data=str(served / "data"),
                runs=str(tmp_path),
                epochs=epochs,
                batch=8,
                k=6,
                eval_every=50,
                device="cpu",
            )
        )
    whole, half = (
        json.loads((tmp_path / name / "sft" / "log.jsonl").read_text().splitlines()[-1])["step"]
        for name in ("whole", "half")
    )
    assert whole > 4 and half == round(whole / 2)
