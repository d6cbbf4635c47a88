"""Simulated shoppers for whom the slots of a page influence each other.

    world = shoppers_of(shop, Habits(), seed=0)
    visits = visit(world, user, page, rng)              what S sessions saw, clicked and bought
    expected(world, user, page)["purchases"]            (S,) the same in closed form

A page is a grid that is read row by row, as in simulator.py. Five things make slots depend on each
other or on their place; each is an option, and each can be switched off:

satiation     an item is worth less for every item of its leaf category above it, by a number of
              logits that differs from user to user (McAlister, Journal of Consumer Research 1982;
              Leqi et al., NeurIPS 2021, arXiv 2011.06741)
substitutes   a purchase ends the need for the leaf category in this session (McAuley et al., KDD
              2015, arXiv 1506.08839)
bored         a row without a click makes the visitor leave with a further probability (departing
              users: Ben-Porat et al., AAAI 2022, arXiv 2203.13423)
glance, next_row    which slots of a row are looked at, and whether the next row is read: users of
              grids read rows, from left to right with little decay, and skip on (Xie et al., WWW
              2019; Guo et al., KDD 2020). next_row .8 is the persistence of rank-biased precision
              (Moffat and Zobel, TOIS 2008)
price         a purchase is less likely the dearer the item. The default is a mean elasticity of
              -2.62 over 1,851 estimates (Bijmolt, van Heerde and Pieters, Journal of Marketing
              Research 2005), which for small chances is the slope in logits

Only price and next_row have values from a source. For the others the sources show that the effect
exists; its size here is an assumption. Results are called simulated.

A session of a page with rows r, in closed form, with s_k the chance of a click in a row that is
read, b_k that of a purchase after it, Q_r the chance of a row without a click, and for a leaf
category l N_rl = prod over the row's slots of l of (1 - s_k b_k):

    P(row r is read, l not bought yet) = prod over rows above of next_row (N_rl - bored Q_r)
"""

from dataclasses import dataclass

import numpy as np

from pagellm.data.shop import Shop
from pagellm.online.simulator import Sessions, sigmoid, world_of
from pagellm.stage import randomness

__all__ = ["Habits", "Shoppers", "expected", "same_kind_above", "shoppers_of", "visit"]


@dataclass(frozen=True)
class Habits:
    """How shoppers read a page and what they mind; see above for the sources."""

    columns: int = 5  # slots in a row
    glance: float = 0.9  # a slot is looked at with probability glance ** column
    next_row: float = 0.8  # probability of going on to the next row
    bored: float = 0.4  # probability of leaving after a row without a click, beside that
    satiation: float = 0.8  # mean logits that an item of the same kind above costs
    satiation_spread: float = 0.5  # its spread over users: gamma distributed, relative
    substitutes: bool = True  # a purchase ends the need for its kind
    click_base: float = -2.5  # logits of a click on an item of 3 stars
    click_taste: float = 1.0  # logits for each star
    buy_base: float = -1.0  # logits of a purchase after a click, at 3 stars and the median price
    buy_taste: float = 0.8  # logits for each star
    buy_price: float = 2.62  # logits for each factor e of price


@dataclass(frozen=True)
class Shoppers:
    """What U users think of N items: click and buy (U, N) in logits, and how they read.

    leaf (N,) kind of every item, -1 unknown    price (N,)    satiation (U,) logits
    """

    click: np.ndarray
    buy: np.ndarray
    leaf: np.ndarray
    price: np.ndarray
    satiation: np.ndarray
    how: Habits


def shoppers_of(shop: Shop, how: Habits = Habits(), seed: int = 0) -> Shoppers:  # noqa: B008
    """The shoppers of a shop whose true ratings are known (simulator.world_of says which)."""
    world = world_of(shop)
    assert shop.truth is not None
    taste = shop.truth.astype(np.float64) - 3.0
    dear = np.log(np.maximum(world.price, 0.01) / np.median(world.price))
    rng = randomness.rng(seed, "shoppers", "satiation")
    each = np.ones(shop.n_users)
    if how.satiation_spread > 0:
        form = 1.0 / how.satiation_spread**2
        each = rng.gamma(form, 1.0 / form, shop.n_users)
    return Shoppers(
        how.click_base + how.click_taste * taste,
        how.buy_base + how.buy_taste * taste - how.buy_price * dear,
        shop.catalogue.leaf_id,
        world.price,
        how.satiation * each,
        how,
    )


def same_kind_above(page: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    """(S, K): how many slots above hold an item of the same known leaf.

    page (S, K) items, -1 past a page's end
    """
    kind = np.where(page >= 0, leaf[np.maximum(page, 0)], -1)
    same = (kind[:, :, None] == kind[:, None, :]) & (kind >= 0)[:, :, None]
    return np.tril(same, -1).sum(2)


def chances(world: Shoppers, user: np.ndarray, page: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S, K): P(click | row is read), P(buy | clicked, need is open); 0 past a page's end."""
    there, item, who = page >= 0, np.maximum(page, 0), np.asarray(user)[:, None]
    tired = world.satiation[who] * same_kind_above(page, world.leaf)
    look = world.how.glance ** (np.arange(page.shape[1]) % world.how.columns)
    click = look * sigmoid(world.click[who, item] - tired)
    return np.where(there, click, 0.0), np.where(there, sigmoid(world.buy[who, item]), 0.0)


def rows_of(how: Habits, K: int) -> list[range]:
    """The slots of every row."""
    return [range(a, min(a + how.columns, K)) for a in range(0, K, how.columns)]


def kinds_of(world: Shoppers, page: np.ndarray) -> np.ndarray:
    """(S, K) kind of every slot; items without a leaf are each a kind of their own, below -1."""
    kind = world.leaf[np.maximum(page, 0)]
    own = -2 - np.arange(page.shape[1])
    return np.where((page >= 0) & (kind >= 0) & world.how.substitutes, kind, own)


def visit(
    world: Shoppers, user: np.ndarray, page: np.ndarray, rng: np.random.Generator
) -> Sessions:
    """Draw one session for each of S visitors: user (S,), page (S, K)."""
    S, K = page.shape
    click, buy = chances(world, user, page)
    kind = kinds_of(world, page)
    look = world.how.glance ** (np.arange(K) % world.how.columns)
    draw, leave = rng.random((3, S, K)), rng.random((2, S, K))
    reads = np.ones(S, bool)
    out = Sessions(*(np.zeros((S, K), bool) for _ in range(3)))
    for row in rows_of(world.how, K):
        any_click = np.zeros(S, bool)
        for k in row:
            out.seen[:, k] = reads & (page[:, k] >= 0) & (draw[0, :, k] < look[k])
            out.clicked[:, k] = out.seen[:, k] & (draw[1, :, k] < click[:, k] / look[k])
            wanted = ~(out.bought[:, :k] & (kind[:, :k] == kind[:, k : k + 1])).any(1)
            out.bought[:, k] = out.clicked[:, k] & wanted & (draw[2, :, k] < buy[:, k])
            any_click |= out.clicked[:, k]
        end = row[-1]
        reads &= leave[0, :, end] < world.how.next_row
        reads &= any_click | (leave[1, :, end] >= world.how.bored)
    return out


def expected(world: Shoppers, user: np.ndarray, page: np.ndarray) -> dict[str, np.ndarray]:
    """Closed-form means of one session for each (user, page); arguments as in `visit`.

    returns clicks, purchases, gmv (S,); sales (S, K) expected purchases of every slot
    """
    K, how = page.shape[1], world.how
    click, buy = chances(world, user, page)
    kind, sale = kinds_of(world, page), click * buy
    same = kind[:, :, None] == kind[:, None, :]  # (S, slot, other slot)
    reads, open_ = np.ones(len(page)), np.ones(page.shape)  # open_: row read, its kind not bought
    clicks, sales = np.zeros(page.shape), np.zeros(page.shape)
    for row in rows_of(how, K):
        at = slice(row[0], row[-1] + 1)
        quiet = np.prod(1 - click[:, at], axis=1)
        clicks[:, at] = reads[:, None] * click[:, at]
        unsold = np.ones(page.shape)
        for k in row:
            sales[:, k] = open_[:, k] * unsold[:, k] * sale[:, k]
            unsold *= np.where(same[:, :, k], 1 - sale[:, k, None], 1.0)
        reads = reads * how.next_row * (1 - how.bored * quiet)
        open_ = open_ * how.next_row * (unsold - how.bored * quiet[:, None])
    gmv = (sales * world.price[np.maximum(page, 0)]).sum(1)
    return {"clicks": clicks.sum(1), "purchases": sales.sum(1), "gmv": gmv, "sales": sales}
