"""Which rows of a table of interactions stay, and which split each belongs to.

Pure functions on numpy columns. Users and items are integers: the rank of their identifier among
all identifiers, so that nothing depends on the order of the lines in a file.

Rows of one user at one time have no order among them. Wherever an order is needed all the same,
`tie_ranks` decides: a hash of seed, user and item, and never the item's number or rating.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pagellm.data.values import NO_TIME

__all__ = [
    "TEST",
    "TRAIN",
    "UNUSED",
    "VALID",
    "group_rank",
    "highest",
    "k_core",
    "latest",
    "random_keys",
    "repeats",
    "split_by_time",
    "split_random",
    "strength",
    "thin",
    "tie_ranks",
]

TRAIN, VALID, TEST, UNUSED = range(4)


def latest(user, item, time, rating, tie) -> np.ndarray:
    """Row numbers, one per (user, item): the latest; then the best rated; then the largest tie.

    user, item (R,) int; time (R,), NO_TIME first; rating (R,) float, NaN lowest; tie (R,) any order
    that does not depend on the order of rows. Returned in order of (user, item).
    """
    order = np.lexsort((tie, np.nan_to_num(rating, nan=-np.inf), time, item, user))
    return order[last_of_pair(user[order], item[order])]


def highest(user, item, time, rating, tie) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers, one per (user, item), of the highest rating; and (kept,) the pair's latest time.

    For logs of events: a view and a purchase of one item count as a purchase. Ties as in `latest`.
    """
    order = np.lexsort((tie, time, np.nan_to_num(rating, nan=-np.inf), item, user))
    ends = last_of_pair(user[order], item[order])
    if not len(order):
        return order, np.zeros(0, time.dtype)
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    return order[ends], np.maximum.reduceat(time[order], starts)


def repeats(user, item, time) -> np.ndarray:
    """How often each (user, item) occurs, in order of (user, item); as in `latest`.

    Rows of a pair at one time are one, so that lines that an export repeats do not count. Rows
    without a time count one each.
    """
    order = np.lexsort((time, item, user))
    user, item, time = user[order], item[order], time[order]
    ends = last_of_pair(user, item)
    if not len(order):
        return np.zeros(0, np.int64)
    counts = np.ones(len(order), np.int64)
    counts[1:] = ends[:-1] | (time[1:] != time[:-1]) | (time[1:] == NO_TIME)
    return np.add.reduceat(counts, np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1]))


def strength(times: np.ndarray) -> np.ndarray:
    """The rating on 1..5 of an item met so many times: 4 for once, 4.5 for twice, up to 5.

    It grows ever more slowly, as people's liking does not double with their purchases.
    """
    return 5.0 - 1.0 / times


def last_of_pair(user, item) -> np.ndarray:
    """(R,) bool over rows sorted by (user, item): True on the last row of each pair."""
    last = np.ones(len(user), dtype=bool)
    last[:-1] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    return last


def k_core(user, item, k: int) -> tuple[np.ndarray, list[dict]]:
    """The largest set of rows in which every user and every item has at least k rows.

    user, item (R,) int, one row per pair. Returns (R,) bool and what was left after each round:
    [{"users": .., "items": .., "rows": ..}, ...]; the last two rounds are equal.
    """
    keep = np.ones(len(user), dtype=bool)
    rounds: list[dict] = []
    while True:
        per_user = np.bincount(user[keep], minlength=user.max(initial=-1) + 1)
        per_item = np.bincount(item[keep], minlength=item.max(initial=-1) + 1)
        rounds.append(
            {
                "users": int((per_user > 0).sum()),
                "items": int((per_item > 0).sum()),
                "rows": int(keep.sum()),
            }
        )
        if len(rounds) > 1 and rounds[-1] == rounds[-2]:
            return keep, rounds
        keep &= (per_user[user] >= k) & (per_item[item] >= k)


def thin(user, item, counted, keys, k: int, n_users: int) -> np.ndarray:
    """(R,) bool: the rows of the lowest keys, as many as make the k-core keep about n_users users.

    user, item (R,) int, one row per pair; counted (R,) bool, the rows that the k-core counts; keys
    (R,) a random draw. A core only grows with its rows, so more rows never leave fewer users, and
    the number of rows is found by halving. Of two numbers of users equally far off, the larger is
    taken. Raises ValueError if even all rows leave fewer than n_users.
    """
    order = np.argsort(keys, kind="stable")

    def users(n: int) -> int:
        rows = order[:n][counted[order[:n]]]
        return k_core(user[rows], item[rows], k)[1][-1]["users"]

    if users(len(order)) < n_users:
        raise ValueError(f"all {len(order):,} rows leave {users(len(order)):,} users")
    few, many = 0, len(order)  # users(few) < n_users <= users(many)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if users(middle) >= n_users else (middle, many)
    keep = np.zeros(len(order), dtype=bool)
    keep[order[: few if n_users - users(few) < users(many) - n_users else many]] = True
    return keep


def random_keys(
    seed: int | str, user, item, user_ids: Sequence[str], item_ids: Sequence[str]
) -> np.ndarray:
    """(R,) uint64: a draw for each row that depends on the seed and the two identifiers alone.

    SHA-256 instead of a generator: the draw is the same on every machine, for every order of lines,
    and whether or not other users are there.
    """
    keys = np.empty(len(user), dtype=np.uint64)
    item_bytes = [name.encode() for name in item_ids]
    prefix, prefix_of = hashlib.sha256(), -1
    pairs = tqdm(
        zip(user.tolist(), item.tolist(), strict=True),
        "  drawing the split",
        len(user),
        unit=" rows",
        unit_scale=True,
        delay=2,
    )
    for row, (u, i) in enumerate(pairs):
        if u != prefix_of:
            prefix, prefix_of = hashlib.sha256(f"{seed}\0{user_ids[u]}\0".encode()), u
        draw = prefix.copy()
        draw.update(item_bytes[i])
        keys[row] = int.from_bytes(draw.digest()[:8], "big")
    return keys


def tie_ranks(
    seed: int | str, user, item, time, user_ids: Sequence[str], item_ids: Sequence[str]
) -> np.ndarray:
    """(R,) int64: the order among rows of one user at one time, drawn by `random_keys`.

    Rows whose (user, time) no other row has get 0; the others their rank by hash. Shopping baskets
    and logs with dates only have many equal times, and if the item's number decided between
    them, identifiers would choose the test row.
    """
    order = np.lexsort((time, user))
    same = np.zeros(len(user), dtype=bool)
    same[1:] = (np.diff(user[order]) == 0) & (np.diff(time[order]) == 0)
    same[:-1] |= same[1:]
    rows = order[same]
    rank = np.zeros(len(user), dtype=np.int64)
    keys = random_keys(f"{seed} order", user[rows], item[rows], user_ids, item_ids)
    # Two equal hashes are as good as impossible; the item's number keeps even those apart.
    rank[rows[np.lexsort((item[rows], keys))]] = np.arange(len(rows))
    return rank


def group_rank(group, *keys) -> tuple[np.ndarray, np.ndarray]:
    """Each row's place within its group in the order of keys, the first key first; group sizes.

    group (R,) int >= 0; keys: (R,) columns. Returns rank, size: (R,) int64.
    """
    order = np.lexsort((*keys[::-1], group))
    size = np.bincount(group)
    starts = np.cumsum(size) - size
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - starts[group[order]]
    return rank, size[group]


def held_out(size) -> np.ndarray:
    """How many of n positives go to each held-out part: max(1, floor(n / 10)); none below 3."""
    return np.where(size >= 3, np.maximum(1, size // 10), 0)


def split_random(user, item, positive, keys) -> np.ndarray:
    """(R,) int8 of TRAIN, VALID, TEST: the paper's split, drawn per user by `random_keys`.

    Of a user's positives max(1, floor(0.1 n)) go to validation and as many to test; users with
    fewer than 3 stay in train. Rows that are not positive are split likewise without the minimum:
    floor(0.1 m).
    """
    split = np.full(len(user), TRAIN, dtype=np.int8)
    for rows, count in ((positive, held_out), (~positive, lambda size: size // 10)):
        rank, size = group_rank(user[rows], keys[rows], item[rows])
        n = count(size)
        split[rows] = np.select([rank < n, rank < 2 * n], [TEST, VALID], TRAIN)
    return split


def split_by_time(user, tie, time, positive, leave_one_out: bool) -> np.ndarray:
    """(R,) int8 of TRAIN, VALID, TEST: each user's latest positives are held out.

    user, tie (R,) int; time (R,); positive (R,) bool. `tie` orders rows of one user at one time:
    see `tie_ranks`.

    leave_one_out: the last positive is test, the one before it validation. Otherwise as many are
    held out as in `split_random`.

    A row that is not positive belongs where its time falls: before the user's first held-out
    positive to train; from there on to validation; from the first test positive on to test. Rows
    at the very time of a held-out positive, such as a basket's other lines, are not before it.
    A row whose time is unknown (below 0) stays in train.
    """
    split = np.full(len(user), TRAIN, dtype=np.int8)
    rank, size = group_rank(user[positive], time[positive], tie[positive])
    n = np.where(size >= 3, 1, 0) if leave_one_out else held_out(size)
    split[positive] = np.select([rank >= size - n, rank >= size - 2 * n], [TEST, VALID], TRAIN)
    other = ~positive
    for part in (VALID, TEST):
        first = np.full(int(user.max(initial=-1)) + 1, np.inf)
        rows = split == part
        rows &= positive
        np.minimum.at(first, user[rows], time[rows])
        split[other & (time >= np.maximum(first[user], 0))] = part
    return split
