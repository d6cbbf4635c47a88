"""A reward function of one's own: what it returns is what is paid; wrong ones are named."""

import hashlib

import numpy as np
import pytest
import torch

from pagellm.model.reward_fn import RewardFunction, check_name
from pagellm.stage.config import PageLLMError

CODE = """
import numpy as np

def page(pages, mask, shop, users):
    return users.float() + mask.sum(1)

def slot(pages, mask, shop, users):
    return np.where(mask.numpy(), pages.numpy() * shop, np.nan)

def bad(pages, mask, shop, users):
    return pages[0]

def nan(pages, mask, shop, users):
    return users * float("nan")

number = 3
"""
PAGES = torch.tensor([[4, 2, 9], [7, -1, -1], [-1, -1, -1]])
MASK = PAGES >= 0
USERS = np.array([10, 20, 30])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text(CODE)
    return tmp_path


def test_a_number_a_page_is_paid_on_its_last_slot(here):
    own = RewardFunction.load("own_rewards:page")
    assert own.source == hashlib.sha256(CODE.encode()).hexdigest()[:16]
    assert own(PAGES, MASK, 1, USERS).tolist() == [[0, 0, 13], [21, 0, 0], [0, 0, 0]]


def test_a_number_a_slot_is_paid_there_and_nothing_off_the_page(here):
    paid = RewardFunction.load("own_rewards:slot")(PAGES, MASK, 2.0, USERS)
    assert paid.tolist() == [[8, 4, 18], [14, 0, 0], [0, 0, 0]] and paid.dtype == torch.float32


def test_a_module_that_was_changed_is_read_anew(here):
    before = RewardFunction.load("own_rewards:page")
    (here / "own_rewards.py").write_text(CODE.replace("mask.sum(1)", "100 * mask.sum(1)"))
    after = RewardFunction.load("own_rewards:page")
    assert after.source != before.source
    assert after(PAGES, MASK, 1, USERS)[1, 0] == 120


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "module no_such_module cannot be imported"),
        ("own_rewards:absent", "has no function absent"),
        ("own_rewards:number", "has no function number"),
    ],
)
def test_what_cannot_be_imported_is_said(here, name, said):
    with pytest.raises(PageLLMError, match=said):
        RewardFunction.load(name)


def test_other_shapes_and_numbers_are_refused(here):
    with pytest.raises(PageLLMError, match=r"bad gave \(3,\) for pages of \(2, 3\): want \(2,\)"):
        RewardFunction.load("own_rewards:bad")(PAGES[:2], MASK[:2], 1, USERS[:2])
    with pytest.raises(PageLLMError, match="not finite"):
        RewardFunction.load("own_rewards:nan")(PAGES[:2], MASK[:2], 1, USERS[:2])


def test_names():
    assert all(check_name(n)[0] for n in ("", "a:b", "a.b_c:d"))
    assert not any(check_name(n)[0] for n in ("a", "a:", ":b", "a:b:c", "a/b:c"))
