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

def three(pages, mask, shop):
    return mask.sum(1)

def deep(pages, mask, shop, users):
    return inner({})

def inner(table):
    return table["price"]

def leaves(pages, mask, shop, users):
    raise SystemExit(4)

def scalar(pages, mask, shop, users):
    return 1.0

def column(pages, mask, shop, users):
    return mask.sum(1, keepdim=True)

def huge(pages, mask, shop, users):
    return np.where(pages.numpy() == 7, 1e300, 1.0)

def nothing(pages, mask, shop, users):
    mask.sum(1)

def words(pages, mask, shop, users):
    return ["good"] * len(pages)

def compound(pages, mask, shop, users):
    return mask.sum(1) * 1j

def texts(pages, mask, shop, users):
    return np.array(["a"] * len(pages))

def counts(pages, mask, shop, users):
    return mask.any(1).int()

def truths(pages, mask, shop, users):
    return mask.any(1).numpy()

def listed(pages, mask, shop, users):
    return [1, 1.0, True]

def learnt(pages, mask, shop, users):
    import torch
    with torch.enable_grad():
        return torch.ones(len(pages), dtype=torch.float64, requires_grad=True)

def scribbles(pages, mask, shop, users):
    pages.fill_(5), mask.fill_(True), users.zero_()
    return users
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
        ("no_such_module:f", r"no module no_such_module\n  It was looked for in"),
        ("own_reward:page", "no module own_reward; did you mean own_rewards"),
        ("own_rewards.deep:page", "no module own_rewards.deep"),
        ("own_rewards:absent", r"has no function absent\n  It has page, slot, bad, nan, "),
        ("own_rewards:pages", "has no function pages; did you mean page"),
        ("own_rewards:number", "has no function number"),
        ("sys:exit", "sys is built in"),
        ("bare:f", "bare is a directory without __init__.py"),
        (
            "own_rewards:three",
            r"as three\(pages, mask, shop, users\), but it is three\(",
        ),
    ],
)
def test_what_cannot_be_imported_is_said(here, name, said):
    (here / "bare").mkdir()
    with pytest.raises(PageLLMError, match=said):
        RewardFunction.load(name)


@pytest.mark.parametrize(
    ("code", "first", "lines"),
    [
        ("x = 1\ny = x +\n", "SyntaxError: invalid syntax", ['broken.py", line 2', "y = x +"]),
        ("x = {}\nx['a']\n", "KeyError: 'a'", ['broken.py", line 2, in <module>', "x['a']"]),
        ("import not_there\n", "ModuleNotFoundError: No module named 'not_there'", ["line 1"]),
        ("from math import nothing\n", "ImportError: cannot import name 'nothing'", ["line 1"]),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", ["line 2"]),
    ],
)
def test_a_module_whose_own_code_fails_shows_its_lines_and_none_of_ours(here, code, first, lines):
    (here / "broken.py").write_text(code)
    with pytest.raises(PageLLMError) as caught:
        RewardFunction.load("broken:f")
    headline, *rest = str(caught.value).splitlines()
    assert headline.startswith(f"reward_fn='broken:f': broken cannot be imported: {first}")
    assert all(any(line in shown for shown in rest) for line in lines)
    assert str(caught.value).count("  File ") == 1  # the module's own line alone


def test_a_function_that_raises_shows_what_it_was_given_and_its_own_lines(here):
    with pytest.raises(PageLLMError) as caught:
        RewardFunction.load("own_rewards:deep")(PAGES, MASK, 1, USERS)
    headline, given, *rest = str(caught.value).splitlines()
    assert headline == "reward_fn='own_rewards:deep' raised KeyError: 'price'"
    assert given == "  It was given pages (3, 3) int64, mask (3, 3) bool, users (3,) int64, on cpu."
    files = [line for line in rest if line.startswith("  File ")]
    assert [line.rsplit(" ", 1)[1] for line in files] == ["deep", "inner"]
    assert all("own_rewards.py" in line for line in files)
    with pytest.raises(PageLLMError, match="raised SystemExit: 4"):
        RewardFunction.load("own_rewards:leaves")(PAGES, MASK, 1, USERS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bad", r"'own_rewards:bad' gave \(3,\) for pages of \(2, 3\): want \(2,\)"),
        ("scalar", r"gave \(\) for pages of \(2, 3\)"),
        ("column", r"gave \(2, 1\) for pages of \(2, 3\)"),
        ("nan", r"not finite for 2 of 2 pages\n  The first is nan for pages\[0\]: user 10"),
        (
            "huge",
            r"for 1 of 2 pages\n.* inf for pages\[1\], slot 0: user 20, items \[7\]",
        ),
        (
            "nothing",
            r"gave NoneType: want a tensor or an array of real numbers\n  It was given",
        ),
        ("words", "gave list: want a tensor"),
        ("compound", "gave Tensor of torch.complex64: want"),
        ("texts", "gave ndarray of <U1: want"),
    ],
)
def test_other_shapes_and_numbers_are_refused(here, name, said):
    with pytest.raises(PageLLMError, match=said):
        RewardFunction.load(f"own_rewards:{name}")(PAGES[:2], MASK[:2], 1, USERS[:2])


@pytest.mark.parametrize("name", ["counts", "truths", "listed", "learnt"])
def test_any_real_numbers_are_taken(here, name):
    paid = RewardFunction.load(f"own_rewards:{name}")(PAGES, MASK, 1, USERS)
    assert paid.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert paid.dtype == torch.float32 and not paid.requires_grad


def test_what_a_function_does_to_its_pages_does_not_change_ours(here):
    pages, mask, users = PAGES.clone(), MASK.clone(), USERS.copy()
    RewardFunction.load("own_rewards:scribbles")(pages, mask, 1, users)
    assert torch.equal(pages, PAGES) and torch.equal(mask, MASK) and (users == USERS).all()


def test_names():
    assert all(check_name(n)[0] for n in ("", "a:b", "a.b_c:d"))
    assert not any(check_name(n)[0] for n in ("a", "a:", ":b", "a:b:c", "a/b:c"))
