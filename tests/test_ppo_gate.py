"""The gate before PPO, the outcome model as item reward, and algorithms without a critic."""

import json
import shutil

import numpy as np
import pytest
import torch

from pagellm import compose, ppo, ppo_gate
from pagellm.data.shop import load
from pagellm.model.choice import choose_mode
from pagellm.model.composer import Composer
from pagellm.model.policy import Policy
from pagellm.ppo_gate import CLOSED, crossed_calibration, hit_correlations, hits, validation_users
from pagellm.ppo_setup import Prompts
from pagellm.stage.config import PageLLMError

SMALL = {
    "rollout": 16,
    "minibatch": 16,
    "k": 6,
    "epochs": 0.1,
    "min_steps": 3,
    "eval_every": 2,
    "inner_epochs": 2,
    "lr": 1e-3,
    "save_every": 1,
}


@pytest.fixture(scope="module")
def judged(served, tmp_path_factory):
    """A shop with SFT, reward model and outcome model."""
    root = tmp_path_factory.mktemp("judged")
    shutil.copytree(served / "data", root / "data")
    for stage in ("sft", "reward"):
        shutil.copytree(served / "runs" / "base" / stage, root / "runs" / "base" / stage)
    compose.run(compose.Config(**where(root), networks=1, k=6))
    return root


def where(root, run="base") -> dict:
    return {"run": run, "data": str(root / "data"), "runs": str(root / "runs"), "device": "cpu"}


def config(root, run, **more) -> ppo.Config:
    return ppo.Config(**where(root, run), source_run="base", **SMALL | more)


def done(root, run) -> dict:
    return json.loads((root / "runs" / run / "ppo" / "done").read_text())


def shop_and_policy(root):
    return load(root / "data" / "synthetic"), Policy.load(root / "runs" / "base" / "sft")


def ask(root, pay, pages=6):
    shop, policy = shop_and_policy(root)
    users = validation_users(shop, 0, 0)
    return hit_correlations(shop, policy, pay(shop, policy), users, 6, pages, 0.5, 0)


def test_a_reward_that_knows_the_hits_opens_and_one_that_knows_nothing_does_not(judged):
    def oracle(shop, policy):
        held = shop.csr("valid")
        return lambda user, p, v, item, mask: torch.from_numpy(
            hits(user, torch.where(mask, item, -1).numpy(), held, shop.n_items)
        )

    def constant(shop, policy):
        return lambda user, p, v, item, mask: torch.zeros(len(item))

    found = ask(judged, oracle)
    assert found["open"] and found["reward"]["mean"] == pytest.approx(1.0)
    assert found["difference"]["count"] == found["sft"]["count"] > 0
    found = ask(judged, constant)
    assert not found["open"] and found["reward"]["mean"] == 0.0


def test_a_large_catalogue_is_asked_by_fewer_users_at_once_and_answers_the_same(judged):
    sizes = []

    def oracle(shop, policy):
        held = shop.csr("valid")

        def pay(user, p, v, item, mask):
            sizes.append(len(np.unique(user)))
            return torch.from_numpy(hits(user, item.numpy(), held, shop.n_items))

        return pay

    whole, n_items = ask(judged, oracle), shop_and_policy(judged)[0].n_items
    assert max(sizes) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_gate, "ENTRIES", 2 * 6 * n_items)  # two users' pages, six each
        sizes.clear()
        parts = ask(judged, oracle)
    assert max(sizes) == 2
    for name in ("reward", "sft", "difference"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-6)


def test_the_policys_own_logits_are_not_above_themselves(judged):
    def own(shop, policy):
        history = shop.csr("train")

        def pay(user, p, v, item, mask):
            prompt, valid = policy.prompt(user, [history.of(u) for u in user])
            z = policy.model.item_logits(policy.model(prompt, valid)[:, -1])
            z = z.gather(1, item.clamp(min=0)).masked_fill(~mask, 0.0).double()
            return (z / torch.arange(2, item.shape[1] + 2).log2()).sum(1)

        return pay

    found = ask(judged, own)
    assert not found["open"] and abs(found["difference"]["mean"]) < 1e-3


def test_hits_are_discounted_by_their_slot(judged):
    shop, _ = shop_and_policy(judged)
    held = shop.csr("valid")
    user = int(np.flatnonzero(held.counts())[0])
    item = held.of(user)[0][0]
    miss = next(i for i in range(shop.n_items) if i not in held.of(user)[0])
    page = np.array([[miss, item, -1], [miss, -1, -1]])
    assert hits(np.array([user] * 2), page, held, shop.n_items).tolist() == [1 / np.log2(3), 0]


def test_a_closed_gate_keeps_sft_and_ends_well(judged, capsys):
    one = config(judged, "closed", w_page=0.0, kl_coef=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_gate, "hit_correlations", lambda *a, **k: fake(open=False))
        ppo.run(one)
    assert CLOSED in capsys.readouterr().out
    record = done(judged, "closed")
    assert record["step"] == record["steps"] == 0 and not record["gate"]["open"]
    a, b = (Policy.load(judged / "runs" / r) for r in ("base/sft", "closed/ppo"))
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    # Serving reads which mode is best, and how good it is, as of a run that was trained.
    assert record["decoding"] == choose_mode(a, load(judged / "data" / "synthetic"), one.k)
    ppo.run(one)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="ended at the gate"):
        ppo.run(config(judged, "closed", w_page=0.0, kl_coef=0.1, force=True))


def fake(**more) -> dict:
    row = {"mean": 0.1, "low": 0.0, "high": 0.2, "count": 9}
    return {"pages": 4, "reward": row, "sft": row, "difference": row} | more


def test_an_open_gate_trains_and_is_asked_once(judged):
    asked = []

    def opened(*args, **more):
        asked.append(args)
        return fake(open=True)

    one, real, saves = config(judged, "open"), ppo.Run.save, []

    def save(self, state):
        real(self, state)
        saves.append(state)
        if len(saves) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_gate, "hit_correlations", opened)
        patch.setattr(ppo.Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            ppo.run(one)
        ppo.run(one)
    assert len(asked) == 1 and done(judged, "open")["steps"] == 3


def test_no_label_of_a_users_own_half_reaches_its_chances(judged):
    shop, policy = shop_and_policy(judged)
    composer = Composer.load(judged / "runs" / "base" / "compose", shop, policy)
    users = validation_users(shop, 0, 0)
    opinion = composer.opinion(users, shop.csr("train", positive=None))
    held = shop.csr("valid")
    plain, bins = crossed_calibration(*opinion, held, shop.n_items)
    assert len(bins) == 10
    # The same, without the even users' held-out items.
    keep = ~np.isin(np.repeat(np.arange(len(held.indptr) - 1), held.counts()), users[::2])
    indptr = np.zeros_like(held.indptr)
    np.cumsum(
        [keep[a:b].sum() for a, b in zip(held.indptr, held.indptr[1:], strict=False)],
        out=indptr[1:],
    )
    fewer = type(held)(indptr, held.items[keep], held.ratings[keep])
    other, _ = crossed_calibration(*opinion, fewer, shop.n_items)
    assert np.array_equal(plain.chance[::2], other.chance[::2])
    assert not np.array_equal(plain.chance[1::2], other.chance[1::2])


@pytest.mark.parametrize(
    "algo, more",
    [
        ("ppo", {}),
        ("rloo", {"samples": 4}),
        ("grpo", {"samples": 4, "sft_coef": 0.5, "relevance_gate": 20}),
        ("dr_grpo", {"samples": 2, "micro": 5}),
        ("expert", {}),
    ],
)
def test_every_algorithm_learns_by_the_outcome_reward_and_resumes_to_the_same_bits(
    judged, algo, more
):
    paid = {"item_reward": "outcome", "w_page": 0.0, "force": True, "gate_users": 10}
    runs = [f"{algo}-whole", f"{algo}-cut"]
    ppo.run(config(judged, runs[0], algo=algo, **paid, **more))
    real, saves = ppo.Run.save, []

    def save(self, state):
        real(self, state)
        saves.append(state)
        if len(saves) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            ppo.run(config(judged, runs[1], algo=algo, **paid, **more))
        ppo.run(config(judged, runs[1], algo=algo, **paid, **more))
    a, b = (done(judged, run) for run in runs)
    assert a["state"] == b["state"] and a["steps"] == 3
    assert len(a["gate"]["reliability"]) == 10
    log = [json.loads(x) for x in open(judged / "runs" / runs[0] / "ppo" / "log.jsonl")]
    assert np.isfinite([row["policy/loss"] for row in log if "policy/loss" in row]).all()
    # What expert iteration learns was not drawn from the old policy, so nothing of it is clipped;
    # the three steps of PPO are its critic's alone.
    assert any("policy/clipfrac" in row for row in log) == (algo not in ("expert", "ppo"))
    start = Policy.load(judged / "runs/base/sft").model.item
    state = torch.load(judged / "runs" / runs[0] / "ppo" / "model.pt", weights_only=True)
    if a["step"] > 0:
        assert not torch.equal(state["weights"]["item"], start)


def test_the_outcome_model_is_asked_about_every_user_of_the_steps_and_no_other(judged):
    """Whether the steps end within an epoch, or go over the users again."""
    made = config(judged, "visited")
    prompts = Prompts(made, *shop_and_policy(judged))
    for steps in (1, 2, 5, 40):
        users = np.concatenate([prompts(step).users for step in range(steps)])
        assert np.array_equal(prompts.visited(steps), np.unique(users))
    assert len(prompts.visited(1)) < len(prompts.users) == len(prompts.visited(40))


def test_outcome_and_pairs_are_read_only_where_they_pay():
    plain = ppo.Config()
    assert plain.reads_pairs and not plain.reads_outcome and not plain.once
    outcome = ppo.Config(item_reward="outcome", w_page=0.0)
    assert outcome.reads_outcome and not outcome.reads_pairs
    assert ppo.Config(item_reward="outcome").reads_pairs
    assert ppo.Config(algo="rloo", samples=2).once
    assert not ppo.Config(algo="rloo", samples=2, draw="slots").once


def test_an_outcome_model_beside_another_policy_is_refused(judged, tmp_path):
    with pytest.raises(PageLLMError, match="no outcome model"):
        ppo.run(config(judged, "x", item_reward="outcome", compose_run="nobody"))
    shutil.copytree(judged / "runs/base/compose", judged / "runs/other/compose")
    path = judged / "runs/other/compose/config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"inputs": {"ppo": "1"}}))
    with pytest.raises(PageLLMError, match="made for another policy"):
        ppo.run(config(judged, "x", item_reward="outcome", compose_run="other"))
