"""Pages that may repeat what a person has: liked items come back, disliked ones do not."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from pagellm import load
from pagellm.serving import recommend
from pagellm.serving.filters import Filters
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.schema import PageRequest
from pagellm.serving.sources import Sources
from pagellm.stage.config import PageLLMError


def loaded(root, **more):
    told = {"data": str(root / "data"), "runs": str(root / "runs"), "run": "base"}
    return Recommender.load(Sources(**told, device="cpu"), **more)


def ids(answer):
    return [slot["item"] for slot in answer["items"]]


def of(known, user):
    """Items that a user liked, and those that they disliked."""
    names = np.array(known.shop.catalogue.ids)
    at = known.shop.user_ids.index(user)
    liked, met = (set(names[rows.of(at)[0]]) for rows in (known.history, known.met))
    return liked, met - liked


@pytest.mark.parametrize("policy", ["sft", "ppo", "compose", "plain"])
def test_pages_of_every_policy_may_hold_what_was_liked(composed, policy):
    """A page of as many slots as there are items tells what is legal: all but the disliked."""
    known = loaded(composed)
    every = known.shop.n_items
    users = [u for u in known.shop.user_ids if of(known, u)[1]][:6]
    assert users
    for user in users:
        liked, disliked = of(known, user)
        room = min(every, known.slots(policy))
        asks = [
            Ask(user=user, k=room, policy=policy, filters=Filters(seen=seen))
            for seen in ("allow", "hide", None)
        ]
        allowed, hidden, default = map(ids, known.answers(asks))
        assert not set(allowed) & disliked and len(set(allowed)) == len(allowed)
        assert not set(hidden) & (liked | disliked) and hidden == default
        if room >= every - len(disliked):
            assert set(allowed) == set(known.shop.catalogue.ids) - disliked


def test_a_request_says_otherwise_than_the_service_and_exclude_holds_all_the_same(composed):
    known = loaded(composed, seen="allow")
    user = max(known.shop.user_ids, key=lambda u: len(of(known, u)[0]))
    liked, _ = of(known, user)
    body = {"user": user, "k": 10, "policy": "plain"}
    told = [{}, {"seen": "hide"}, {"seen": "allow"}, {"seen": "allow", "exclude": sorted(liked)}]
    asks = [PageRequest.model_validate(body | {"filters": f}).ask() for f in told]
    default, hidden, allowed, without = map(ids, known.answers(asks))
    assert default == allowed and set(default) & liked
    assert not set(hidden) & liked and not set(without) & liked


def test_what_a_request_says_was_liked_may_come_back_too(composed):
    known = loaded(composed)
    a, b = known.shop.catalogue.ids[:2]
    history = ((a, 5.0), (b, 1.0))
    room = known.slots("plain")
    ask = Ask(history=history, k=room, policy="plain", filters=Filters(seen="allow"))
    page = ids(known.answers([ask])[0])
    assert a in page and b not in page


def test_everybodys_file_and_pages_in_python_take_it(composed, tmp_path):
    told = {"run": "base", "data": str(composed / "data"), "runs": str(composed / "runs")}
    told |= {"device": "cpu", "k": 6, "policy": "plain", "all": True}
    out = str(tmp_path / "pages.parquet")
    recommend.run(recommend.Config(out=out, seen="allow", **told))
    known = loaded(composed)
    rows = pq.read_table(out).to_pylist()
    again = sum(row["item_id"] in of(known, row["user_id"])[0] for row in rows)
    assert again > 0
    with pytest.raises(PageLLMError, match="was made with another seen"):
        recommend.run(recommend.Config(out=out, **told))
    model = load("base", runs=composed / "runs", data=composed / "data", device="cpu")
    user = rows[0]["user_id"]
    pages = model.pages(users=[user], k=6, policy="plain", seen="allow")
    assert pages["item"].to_pylist() == [r["item_id"] for r in rows if r["user_id"] == user]
    with pytest.raises(PageLLMError, match="want hide or allow"):
        model.pages(users=[user], seen="show")
    with pytest.raises(PageLLMError, match="want hide or allow"):
        recommend.Config(user="u", seen="show")


def test_a_file_that_another_model_made_is_left_as_it_is(composed, tmp_path):
    """Options given before and no longer count too; a file that says nothing is never taken."""
    runs = tmp_path / "runs"
    shutil.copytree(composed / "runs", runs)
    told = {"run": "base", "data": str(composed / "data"), "runs": str(runs), "device": "cpu"}
    told |= {"k": 4, "all": True, "out": str(tmp_path / "pages.parquet")}
    recommend.run(recommend.Config(policy="sft", new_items=1, new_days=400, **told))
    written = (tmp_path / "pages.parquet").read_bytes()
    with pytest.raises(PageLLMError, match="another new_days, new_items; it was left as it is"):
        recommend.run(recommend.Config(policy="sft", **told))
    shutil.rmtree(runs / "base" / "sft")
    shutil.copytree(runs / "base" / "ppo", runs / "base" / "sft")
    with pytest.raises(PageLLMError, match=r"by another model \(sft\)"):
        recommend.run(recommend.Config(policy="sft", new_items=1, new_days=400, **told))
    assert (tmp_path / "pages.parquet").read_bytes() == written
    table = pq.read_table(tmp_path / "pages.parquet").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "pages.parquet")
    with pytest.raises(PageLLMError, match="does not say what it was made from"):
        recommend.run(recommend.Config(policy="sft", **told))
