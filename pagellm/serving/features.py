"""Features of (user, item) pairs for a ranker that serves without this library (paper, 5.4, 6.6).

Reads   data/<dataset>, runs/<run>/ppo, sft or compose, runs/<run>/reward where it is there; a
        Parquet file of pairs: user_id, item_id
Writes  the pairs with two more columns

    pagellm features --pairs pairs.parquet --out features.parquet

    dot        h_u . e_i, the logit of item i in the first slot of u's page
    marginal   R(page with i) - R(page without i), R = R_c + R_f (Eq. 5, 6), of the page that the
               policy writes for u. An item of the page is removed, and those below it move up; any
               other item is added at the page's end. Left out where there is no reward model

`python -m experiments.ranker` measures what they add to a LightGBM ranker. About 4,000 pairs a
second on one core.
"""

import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pagellm.data.shop import Rows
from pagellm.data.tables import ids_of, read_table, told
from pagellm.model.backbone import KVCache
from pagellm.model.decode import item_tokens
from pagellm.model.policy import MODES, Policy
from pagellm.model.prompts import pad_ids
from pagellm.model.reward_model import RewardModel, mean_reward
from pagellm.serving.recommender import Ask, Recommender
from pagellm.serving.sources import WRITERS, Sources
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic
from pagellm.stage.hints import counted
from pagellm.stage.outputs import check_file

__all__ = ["Config", "marginal_reward", "pair_features", "run"]

PAIR = ("user_id", "item_id")  # columns that are read


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Add dot(h_u, e_i) and the marginal page reward to a file of (user, item) pairs."""

    pairs: str = ""  # Parquet file with user_id and item_id, the shop's own; other columns are kept
    out: str = ""  # Parquet file to write
    policy: str = ""  # whose h_u, e_i and pages are used: ppo or sft; or compose, which means
    # composed pages, and h_u, e_i of the policy that proposes for them; empty: ppo if it is there,
    # else sft
    split: str = "test"  # rows held out, as in evaluate: prompts and pages know nothing of them. A
    # ranker that is tested on these rows must not have them in its features. none: no row is held
    # out, for pairs that are served
    k: int = 20  # slots of the page that an item is added to or taken from
    mode: str = "auto"  # how ppo or sft decode the page: greedy, beam, one_shot or hybrid; auto:
    # what validation chose
    batch: int = 512  # pages in a forward pass of the reward model

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            policy=(self.policy in ("", *WRITERS), f"{', '.join(WRITERS)}, or nothing"),
            mode=(self.mode in ("auto", *MODES), f"auto, {', '.join(MODES)}"),
            k=(self.k > 0, "1 or more"),
            batch=(self.batch > 0, "1 or more"),
        )
        if not (self.pairs and self.out):
            raise PageLLMError("want --pairs (a Parquet file of user_id, item_id) and --out")


@torch.no_grad()
def marginal_reward(
    reward: RewardModel,
    prompt: Tensor,
    valid: Tensor,
    page: Tensor,
    mask: Tensor,
    item: Tensor,
    batch: int = 512,
) -> Tensor:
    """How much each of some items changes the reward R = R_c + R_f (Eq. 5, 6) of its user's page.

    prompt, valid  (B, P)
    page, mask     (B, K) as in decode.Pages
    item           (B, M) int64, -1: none
    batch          pages in a forward pass
    returns        (B, M) float32 on the CPU: R(page) - R(page less the item) where it is on the
                   page, else R(page and then the item) - R(page); NaN where there is no item
    """
    (B, M), K, device, trunk = item.shape, page.shape[1], page.device, reward.trunk
    page = torch.where(mask, page, -1)
    cache = KVCache(trunk.shape, B, prompt.shape[1] + K + 1, trunk.word)
    read = torch.cat([valid, mask], 1)
    ids, P = torch.cat([prompt, item_tokens(trunk, page, 0)], 1), prompt.shape[1]
    after = trunk(ids, read, cache, placed=P)[:, P:].float()
    token, total = reward.heads(prompt, valid, page, mask, after)
    base, out = total + mean_reward(token, mask), torch.full((B, M), torch.nan, device=device)
    there = (page[:, None] == item[..., None]).any(2) & (item >= 0)  # (B, M)
    for row, column in chunks(~there & (item >= 0), batch):
        # The prompt and the page were read once; only the new item's column is computed here.
        mine = KVCache(trunk.shape, 0, 0, trunk.word)
        mine.keys, mine.values, mine.length = cache.keys, cache.values, cache.length
        mine.pooled = cache.pooled
        mine.select(row)
        one = torch.ones(len(row), 1, dtype=torch.bool, device=device)
        added = item[row, column]
        ids = item_tokens(trunk, added, 0)[:, None]
        state = trunk(ids, torch.cat([read[row], one], 1), mine, placed=0)[:, -1].float()
        longer, states, end = (
            F.pad(page[row], (0, 1), value=-1),
            F.pad(after[row], (0, 0, 0, 1)),
            mask[row].sum(1),
        )
        at = torch.arange(len(row), device=device)
        longer[at, end], states[at, end] = added, state
        token, total = reward.heads(prompt[row], valid[row], longer, longer >= 0, states)
        out[row, column] = total + mean_reward(token, longer >= 0) - base[row]
    for row, column in chunks(there, batch):
        gone = (page[row] == item[row, column, None]) | (page[row] < 0)
        # A stable sort by "is this item, or empty" moves the items below one slot up.
        less = (
            page[row].masked_fill(gone, -1).gather(1, gone.long().sort(dim=1, stable=True).indices)
        )
        token, total = reward(prompt[row], valid[row], less, less >= 0)
        out[row, column] = base[row] - total - mean_reward(token, less >= 0)
    return out.cpu()


def chunks(chosen: Tensor, size: int):
    """(row, column) indices of the True cells, `size` at a time."""
    if chosen.any():
        row, column = chosen.nonzero(as_tuple=True)
        yield from zip(row.split(size), column.split(size), strict=True)


@torch.no_grad()
def pair_features(
    policy: Policy,
    reward: RewardModel | None,
    history: Rows,
    seen: Rows,
    users: np.ndarray,
    item: np.ndarray,
    k: int = 20,
    mode: str = "greedy",
    batch: int = 512,
    progress: str = "",
    pages: Callable[[np.ndarray], tuple[Tensor, Tensor]] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """dot and marginal (U, M) float32 of items (U, M) int64, -1: none (NaN), for users (U,).

    reward   None: marginal is None
    history  what the prompts show
    seen     what no page may hold
    pages    users (B,) -> item and mask (B, k) of their pages; None: the policy writes them
    """
    policy.check_room(k + 1)
    dots, margins, device = [], [], policy.model.word.device
    for at in tqdm(
        range(0, len(users), 64), desc=progress, unit="batch", disable=not progress, mininterval=1.0
    ):
        some, mine = users[at : at + 64], torch.from_numpy(item[at : at + 64]).to(device)
        prompt, valid = policy.prompt(some, [history.of(u) for u in some])
        logits = policy.model.item_logits(policy.model(prompt, valid)[:, -1])
        dot = logits.float().gather(1, mine.clamp(min=0))
        dots.append(torch.where(mine >= 0, dot, torch.nan).cpu())
        if reward is not None:
            if pages is None:
                written, _ = policy.write(some, history, seen, k, mode)
                page, mask = written.item, written.mask
            else:
                page, mask = (x.to(device) for x in pages(some))
            margins.append(marginal_reward(reward, prompt, valid, page, mask, mine, batch))
    return torch.cat(dots).numpy(), torch.cat(margins).numpy() if margins else None


def read_pairs(path: str) -> pa.Table:
    """The file of pairs. Raises PageLLMError if it cannot be read, is empty, or has our columns."""
    pairs = read_table(Path(path), PAIR)
    if not len(pairs):
        raise PageLLMError(f"{path} has no rows; want one a pair of user_id and item_id")
    if twice := {"dot", "marginal"} & set(pairs.column_names):
        raise PageLLMError(f"{path} has a column {' and '.join(sorted(twice))} already; rename it")
    return pairs


def dense_ids(
    config: Config, pairs: pa.Table, name: str, known: dict[str, int], below: Container[str] = ()
) -> np.ndarray:
    """(R,) int64: a column of ids as dense ids. Ids are text: see `pagellm.data.values.identifier`.

    below  ids of the log that are below the k-core
    Raises PageLLMError for a column that is missing, and for ids that the data do not have.
    """
    if name not in pairs.column_names:
        raise PageLLMError(
            f"{config.pairs}: no column {name}; it has {', '.join(pairs.column_names)}"
        )
    ids = ids_of(pairs, name, config.pairs)
    if strange := [i for i in ids if i not in known]:
        rare = sum(i in below for i in strange)
        raise PageLLMError(
            f"{config.pairs}: not in {config.data_dir}: {counted(len(strange), 'row')} of column "
            f"{name}, first {strange[0]!r}"
            + (f"; below the k-core: {rare:,} of them" if rare else "")
            + "\n  Leave them out: the model has no row for them."
        )
    return np.array([known[i] for i in ids], np.int64)


def holds_features(path: Path) -> bool:
    """Whether a file is one that this command wrote."""
    try:
        return set(pq.read_schema(path).names) >= {*PAIR, "dot"}
    except pa.ArrowInvalid:
        return False


def run(config: Config) -> None:
    """Write the file with its features. Errors as in `read_pairs` and `dense_ids`."""
    check_file(Path(config.out), holds_features)
    pairs = read_pairs(config.pairs)
    config = replace(config, policy=config.policy_there(config.policy))
    rec = Recommender.load(config, (config.policy,))
    if config.policy not in rec.networks:
        raise PageLLMError(
            "these composed pages were made without a policy (compose --policy none), so there is "
            "no h_u: want --policy sft or ppo"
        )
    print(f"features: {rec.in_words()}")
    kept = " and kept" if len(pairs.column_names) > len(PAIR) else ""
    print(f"features: {told(config.pairs, pairs, PAIR)}{kept}")

    def composed(users: np.ndarray) -> tuple[Tensor, Tensor]:
        asks = [rec.resolve(Ask(user=rec.shop.user_ids[u], k=config.k)) for u in users]
        made = rec.compose("compose", asks, config.k)
        page = torch.from_numpy(made.item)
        return page, page >= 0

    user, item = (
        dense_ids(config, pairs, name, known, below)
        for name, known, below in (
            ("user_id", rec.user_of, rec.left_out.users),
            ("item_id", rec.item_of, set(rec.left_out.items)),
        )
    )
    # Every user's pages are written once: a row a user, that user's items side by side.
    users, back = np.unique(user, return_inverse=True)
    order = np.argsort(back, kind="stable")
    ends = np.cumsum(np.bincount(back, minlength=len(users)))[:-1]
    grid = pad_ids(np.split(item[order], ends), -1)
    dot, marginal = pair_features(
        rec.networks[config.policy],
        rec.reward,
        rec.history,
        rec.met,
        users,
        grid,
        config.k,
        config.mode if config.mode != "auto" else rec.modes.get(config.policy, "greedy"),
        config.batch,
        "features",
        composed if config.policy == "compose" else None,
    )
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    for name, values in (("dot", dot), ("marginal", marginal)):
        if values is not None:
            pairs = pairs.append_column(name, pa.array(values[grid >= 0][place]))
    with atomic(Path(config.out)) as beside:
        pq.write_table(pairs, beside)
    missing = "" if marginal is not None else "; no reward model, so no column marginal"
    print(
        f"features: {config.out}, {counted(len(pairs), 'pair')} of "
        f"{counted(len(users), 'user')}{missing}"
    )


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm features"))
