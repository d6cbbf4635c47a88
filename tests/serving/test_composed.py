"""Composed pages on request: those that evaluation scores, for anybody, under every filter."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.pages.ranked import seen_rows
from pagellm.serving import features, recommend
from pagellm.serving.cache import Cache
from pagellm.serving.filters import Filters
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json, write_json


def sources(root, **more):
    where = {"run": "base", "data": str(root / "data"), "runs": str(root / "runs")}
    return Sources(**where, device="cpu", **more)


@pytest.fixture(scope="module")
def crec(composed):
    """A Recommender with composed pages, test rows held out as in evaluate."""
    return Recommender.load(sources(composed, split="test"))


@pytest.fixture(scope="module")
def open_rec(composed):
    """The same as a shop runs it: nothing held out."""
    return Recommender.load(sources(composed))


def ids(answer):
    return [slot["item"] for slot in answer["items"]]


def one(rec, **ask):
    (answer,) = rec.answers([Ask(**{"k": 6, "policy": "compose"} | ask)])
    return answer


def test_a_known_users_page_is_the_page_that_evaluation_scores(crec):
    users = np.arange(crec.shop.n_users)
    ranked = crec.composer.rank(users, seen_rows(crec.shop, "test", "train+valid"), 6, 100)
    answers = crec.answers([Ask(user=name, k=6, policy="compose") for name in crec.shop.user_ids])
    assert [[crec.item_of[i] for i in ids(a)] for a in answers] == [
        [i for i in row[:6] if i >= 0] for row in ranked.item.tolist()
    ]
    assert all(a["policy"] == "compose" and a["decoding"] is None for a in answers)


@pytest.mark.parametrize("policy", ["compose", "plain"])
@pytest.mark.parametrize("which", ["crec", "open_rec"])
def test_one_page_and_a_batch_and_a_cache_give_the_same_page(policy, which, request):
    rec = request.getfixturevalue(which)
    c = rec.shop.catalogue
    some = [
        Ask(user=rec.shop.user_ids[3], k=6, policy=policy),
        Ask(user=rec.shop.user_ids[3], k=4, policy=policy),
        Ask(history=((c.ids[1], 5.0), (c.ids[2], 1.0)), k=6, policy=policy),
        Ask(user=rec.shop.user_ids[5], history=((c.ids[1], float("nan")),), k=6, policy=policy),
        Ask(k=6, policy=policy),
    ]
    alone = [
        Recommender(
            rec.shop, rec.policies, rec.reward, rec.hashes, rec.split, Cache(0),
            composer=rec.composer,
        ).answers([ask])[0]
        for ask in some
    ]  # fmt: skip
    for answers in (rec.answers(some), rec.answers(some + some)[5:]):
        for a, b in zip(alone, answers, strict=True):
            assert ids(a) == ids(b) and len(ids(a)) == len(set(ids(a)))
            assert [s["score"] for s in a["items"]] == pytest.approx(
                [s["score"] for s in b["items"]], abs=1e-4
            )
            assert b["page_reward"] == pytest.approx(a["page_reward"], abs=1e-4)


@pytest.mark.parametrize("policy", ["compose", "plain"])
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_filters_hold_and_fill_the_page_as_far_as_they_allow(open_rec, policy, data):
    rec, c = open_rec, open_rec.shop.catalogue
    some_ids = st.lists(st.sampled_from(c.ids), max_size=40)
    f = Filters(
        exclude=tuple(data.draw(some_ids)),
        categories=data.draw(
            st.none() | st.lists(st.sampled_from([*rec.members, "?"]), max_size=4).map(tuple)
        ),
        in_stock=data.draw(st.none() | some_ids.map(tuple)),
        price_max=data.draw(st.none() | st.floats(0, 100)),
    )
    user = data.draw(st.none() | st.sampled_from(rec.shop.user_ids))
    given_ids = data.draw(st.lists(st.sampled_from(c.ids), max_size=3, unique=True))
    history = tuple((name, data.draw(st.sampled_from([1.0, 5.0]))) for name in given_ids)
    k = data.draw(st.integers(1, 12))
    page = one(rec, user=user, history=history, k=k, filters=f, policy=policy)
    case = rec.resolve(Ask(user=user, history=history, filters=f, policy=policy))
    legal = np.ones(rec.shop.n_items, bool) if case.allowed is None else case.allowed.numpy().copy()
    legal[case.seen] = False
    assert set(given_ids).isdisjoint(ids(page))  # liked or not: met is met
    assert all(legal[rec.item_of[i]] for i in ids(page))
    assert len(ids(page)) == len(set(ids(page))) == min(k, int(legal.sum()))


def test_what_is_told_moves_the_page_and_unknown_items_are_named(open_rec):
    rec, c = open_rec, open_rec.shop.catalogue
    nobody = one(rec, history=())
    liked = one(rec, history=((c.ids[0], 5.0), (c.ids[9], 5.0), ("?", 5.0)))
    assert ids(nobody) != ids(liked) and liked["unknown"]["items"] == ["?"]
    loved, hated = (
        rec.person(rec.resolve(Ask(history=((c.ids[0], r),), policy="compose"))) for r in (5.0, 1.0)
    )
    assert loved.liked.items.tolist() == [0] and hated.disliked.items.tolist() == [0]
    assert len(hated.liked.items) == 0 and not hated.factors["liked"].any()
    user = rec.shop.user_ids[2]
    events = rec.events(rec.resolve(Ask(user=user, history=((c.ids[0], 5.0),), policy="compose")))
    assert len(events[0]) == len(set(events[0])) and events[0][-1] == 0
    stored = rec.shop.user == 2
    assert set(events[0]) == set(rec.shop.item[stored]) | {0}  # every split: nothing is held out
    why = one(rec, user=user, explain=True)["items"]
    assert all(slot["similar"] and slot["score"] <= 0 for slot in why)


def test_pages_need_no_reward_model_and_no_network(composed, tmp_path):
    shutil.copytree(composed / "data", tmp_path / "data")
    for stage in ("sft", "compose"):
        shutil.copytree(composed / "runs/base" / stage, tmp_path / "runs/base" / stage)
    rec = Recommender.load(sources(tmp_path), ("compose",))
    assert rec.names == ("compose", "plain") and rec.policies == {}
    page = one(rec, user=rec.shop.user_ids[0])
    assert page["page_reward"] is None and len(ids(page)) == 6
    with pytest.raises(PageLLMError, match="policy=ppo: not served here"):
        rec.resolve(Ask(policy="ppo"))


def standing(root, **means):
    """Write what validation says of every policy: name -> NDCG@100, Recall@20, ILD and energy."""
    for name, value in means.items():
        path = root / "runs/base" / name / "done"
        record = {"who": "x", "k": 6, "users": 9, "means": value}
        kept = read_json(path)
        key = {"valid": record} if name == "compose" else {"decoding": {"valid": record}}
        write_json(path, kept | key)


def row(ndcg, recall, ild, energy):
    return {"NDCG@100": ndcg, "Recall@20": recall, "ILD": ild, "energy": energy}


def test_the_default_is_the_best_on_validation_of_those_that_are_there(composed, tmp_path):
    for part in ("data", "runs"):
        shutil.copytree(composed / part, tmp_path / part)
    config = sources(tmp_path)
    standing(
        tmp_path,
        sft=row(0.40, 0.60, 0.80, 2.8),
        ppo=row(0.39, 0.60, 0.90, 3.0),
        compose=row(0.38, 0.50, 0.95, 3.1),
    )
    found = config.default()
    assert found.policy == "ppo"  # compose gives away a sixth of Recall, ppo a fortieth of NDCG
    assert found.worst["compose"] == pytest.approx(-1 / 6) and "ppo -5.3%" in found.why
    standing(tmp_path, compose=row(0.41, 0.61, 0.95, 3.1))
    assert config.default().policy == "compose"
    assert config.default("sft") == ("sft", "asked for", {})
    path = tmp_path / "runs/base/ppo/done"
    write_json(path, {k: v for k, v in read_json(path).items() if k != "decoding"})
    assert "ppo made otherwise" in config.default().why and config.default().policy == "compose"
    done = read_json(tmp_path / "runs/base/sft/done")
    write_json(tmp_path / "runs/base/sft/done", done | {"id": "another"})
    found = config.default()
    assert found.policy == "ppo" and "left out: made from another sft" in found.why
    assert config.policies_there() == ("ppo", "sft")


def test_stages_record_a_mode_and_what_validation_says_of_the_same_users(composed):
    base = composed / "runs/base"
    found = {name: read_json(base / name / "done") for name in ("sft", "ppo", "compose")}
    valid = [found["sft"]["decoding"]["valid"], found["ppo"]["decoding"]["valid"]]
    valid.append(found["compose"]["valid"])
    assert len({(row["who"], row["k"], row["users"]) for row in valid}) == 1
    for name in ("sft", "ppo"):
        record = found[name]["decoding"]
        assert set(record["tried"]) == {"greedy", "one_shot"} and record["mode"] in record["tried"]
        assert sources(composed).mode_of(name) == record["mode"]
    assert sources(composed).default().worst.keys() == {"compose", "ppo", "sft"}


def test_an_ask_without_a_mode_is_decoded_as_validation_chose(crec):
    for mode in ("greedy", "one_shot"):
        r = Recommender(
            crec.shop, crec.policies, None, crec.hashes, "test", modes={"sft": mode}
        )  # fmt: skip
        user = crec.shop.user_ids[1]
        bare, told = (r.answers([Ask(user=user, k=6, policy="sft", mode=m)])[0] for m in ("", mode))
        assert ids(bare) == ids(told) and bare["decoding"] == mode
        assert r.group(Ask(policy="sft")) == r.group(Ask(policy="sft", mode=mode))


def test_variety_inside_decoding_parts_what_is_alike(crec):
    user, kin = crec.shop.user_ids[1], crec.kin
    for mode in ("greedy", "one_shot", "beam"):
        pages = [
            one(crec, user=user, policy="sft", mode=mode, variety=v, strength=20.0)
            for v in ("none", "mmr", "energy")
        ]
        kinds = [len({kin.leaf[crec.item_of[i]] for i in ids(page)}) for page in pages]
        assert kinds[0] <= min(kinds[1:]) and len(ids(pages[1])) == 6
    near = one(crec, user=user, policy="sft", variety="mmr", strength=0.0, mode="greedy")
    assert ids(near) == ids(one(crec, user=user, policy="sft", mode="greedy"))


def test_the_command_says_which_policy_wrote_and_why(composed, capsys):
    where = {"run": "base", "data": str(composed / "data"), "runs": str(composed / "runs")}
    recommend.run(recommend.Config(**where, user="U0001000", k=5, policy="compose"))
    said = capsys.readouterr().out
    assert "recommend: policy compose: asked for" in said and "· compose " in said
    recommend.run(recommend.Config(**where, user="U0001000", k=5))
    assert "worst difference to another on validation: compose" in capsys.readouterr().out
    with pytest.raises(PageLLMError, match="ranks 150 candidates"):
        recommend.run(
            recommend.Config(**where, all=True, out="x.parquet", depth=151, policy="compose")
        )


def test_everybodys_file_has_the_pages_of_single_requests(composed, open_rec, tmp_path):
    out, gone = tmp_path / "pages.parquet", open_rec.shop.catalogue.ids[3]
    where = {"run": "base", "data": str(composed / "data"), "runs": str(composed / "runs")}
    config = recommend.Config(
        **where, all=True, out=str(out), k=6, depth=30, policy="compose", exclude=gone
    )
    recommend.run(config)
    table = pq.read_table(out).to_pylist()
    filters = Filters(exclude=(gone,))
    for name in open_rec.shop.user_ids[:9]:
        rows = [r for r in table if r["user_id"] == name]
        assert [r["item_id"] for r in rows if r["page"]] == ids(
            one(open_rec, user=name, filters=filters)
        )
        assert len(rows) <= 30 and all(a["score"] >= b["score"] for a, b in pairwise(rows))
    made = json.loads(pq.read_schema(out).metadata[b"pagellm"])
    assert made["policy"] == "compose" and made["why"] == "asked for"


def test_features_of_pairs_are_about_the_composed_page(composed, open_rec, tmp_path):
    import pyarrow as pa

    page = one(open_rec, user="U0001000")
    pairs = pa.table({"user_id": ["U0001000"] * 2, "item_id": [ids(page)[0], ids(page)[3]]})
    pq.write_table(pairs, tmp_path / "pairs.parquet")
    where = {"run": "base", "data": str(composed / "data"), "runs": str(composed / "runs")}
    features.run(
        features.Config(
            **where, pairs=str(tmp_path / "pairs.parquet"), out=str(tmp_path / "out.parquet"),
            policy="compose", split="none", k=6,
        )
    )  # fmt: skip
    made = pq.read_table(tmp_path / "out.parquet")
    less = ids(page)[1:]
    whole, part = (
        open_rec.answers([Ask(user="U0001000", page=tuple(p))])[0] for p in (ids(page), less)
    )

    def worth(answer):
        return answer["page_reward"] + np.mean([s["token_reward"] for s in answer["items"]])

    assert made["marginal"][0].as_py() == pytest.approx(worth(whole) - worth(part), abs=1e-4)
