"""The study of updates: the log is cut at days; a page never holds what its model does not know."""

import numpy as np
import pytest

from experiments import updates
from pagellm.data.shop import Rows, load
from pagellm.pages.ranked import RankedPages
from pagellm.stage.config import PageLLMError


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Two days of a made-up log: item new arrives with the second."""
    from pagellm.data import prepare

    root = tmp_path_factory.mktemp("updates")
    rng = np.random.default_rng(0)
    begin = np.datetime64(updates.FIRST["x_wines"]).astype("datetime64[D]").astype(float)
    user, item = (x.ravel() for x in np.meshgrid(np.arange(8), np.arange(9), indexing="ij"))
    time = begin + rng.uniform(-100, 119, len(user))
    new = item == 0
    time[new] = begin + 30 + user[new]
    log = updates.Log(user.astype(str), np.where(new, "new", item.astype(str)), time, {})
    config = updates.Config(dataset="x_wines", data=str(root))
    for day in (0, 1):
        prepare.run(updates.cut(log, config, day))
    return config, log, [load(root / "updates" / f"x_wines-{day}") for day in (0, 1)]


def test_a_day_knows_what_came_before_it_and_is_scored_on_the_step_after(days):
    config, log, (first, second) = days
    begin = np.datetime64(updates.FIRST["x_wines"]).astype("datetime64[D]").astype(float)
    for day, shop in enumerate((first, second)):
        now = begin + 60 * day
        assert shop.rows(("train", "valid")).sum() == (log.time < now).sum()
        assert shop.rows("test").sum() == ((log.time >= now) & (log.time < now + 60)).sum()
    day = updates.Day(second, first)
    assert [name for name, new in zip(second.catalogue.ids, day.new, strict=True) if new] == ["new"]


def test_exposure_counts_slots_and_what_was_chosen(days):
    _, _, (first, second) = days
    day = updates.Day(second, first)
    new = second.catalogue.ids.index("new")
    day.held = Rows(np.array([0, 2]), np.array([new, 1]), np.zeros(2, np.float32))
    page = np.full((1, 30), -1)
    page[0, :2] = 3, new
    found = day.exposed(RankedPages(np.array([0]), page, page * 0.0, np.array([2])))
    assert found["new slots"] == 1 / updates.K and found["new found"] == 1.0


def test_rows_go_from_the_older_numbers_to_the_newer(days):
    _, _, (first, second) = days
    found = updates.update.change(first, second)
    rows = updates.in_numbers(first.csr("train"), first, found, second.n_users)
    for user, name in enumerate(second.user_ids):
        mine = {second.catalogue.ids[i] for i in rows.of(user)[0]}
        if name in first.user_ids:
            before = first.csr("train").of(first.user_ids.index(name))[0]
            assert mine == {first.catalogue.ids[i] for i in before}
        else:
            assert not mine


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PageLLMError, match="name the directory of x_wines with --raw"):
        updates.run(updates.Config(dataset="x_wines", raw=str(tmp_path / "gone")))
