"""Case study (the paper's appendix H): single users' prompts, pages, hits and rewards, in text.

Reads   data/<dataset>, runs/<run>/sft, evaluate, reward where there is one; of ppo and compose what
        was evaluated
Prints  for each user: prompt, true page, and every policy's page with hits, and with the reward of
        every slot where the run has a reward model; then exact, same-category and same-brand hits
        over all users, with intervals

    make casestudy                  pagellm casestudy --user U0001000,U0001013

`make report` shows twenty users in the same way. Seconds for the synthetic shop.
"""

import sys
from dataclasses import dataclass

import numpy as np

from pagellm.data.tables import id_list
from pagellm.evaluate import LABELS
from pagellm.model.policy import Policy
from pagellm.pages.stats import difference
from pagellm.pages.truth import Ties, ground_truth_page
from pagellm.report.findings import Found, Missing, read
from pagellm.report.measure import (
    PageRewards,
    brand_hits,
    hits,
    page_items,
    prompt_text,
    rewards_of_rows,
    trace,
)
from pagellm.stage import randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.hints import counted
from pagellm.stage.run import StageConfig

__all__ = ["Config", "KINDS", "case_text", "counts", "run"]


KINDS = ("exact", "same category", "same brand")
MARKS = ("✓", "≈", "◇")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Print users' prompts, true and predicted pages, hits and rewards slot by slot."""

    dataset: str = ""  # name of the data set; empty: the one the run's stages name
    user: str = ""  # users to show: the shop's ids, comma-separated, in quotes where one holds a
    # comma; @path: a file of them, one a line; empty: drawn at random
    users: int = 2  # number of users drawn at random where --user is empty

    def __post_init__(self):
        super().__post_init__()
        check(self, users=(self.users > 0, "1 or more"))


def counts(found: Found, policy: str) -> np.ndarray:
    """Hits of each kind on each user's page, (3, U), in the order of KINDS.

    A slot that is an exact hit counts only there; another slot may share category and brand both.
    """
    pages = found.pages[policy]
    exact, same = hits(pages, found.scoring, found.k)
    return np.stack(
        [m.sum(1) for m in (exact, same, brand_hits(pages, found.scoring, found.k))]
    ).astype(float)


def clip(words: str, width: int) -> str:
    """`words` cut to at most `width` characters, the last of them an ellipsis."""
    return words if len(words) <= width else words[: width - 1] + "…"


def case_text(
    found: Found, policy: Policy, row: int, rewards: PageRewards | None = None, at: int = 0
) -> str:
    """The text about the user in this row of the pages files.

    rewards, at  of the same user, who is row `at` of `rewards`; None where nothing was judged
    """
    written, c = found.written("a case study"), found.data.catalogue
    user = int(next(iter(written.values())).user[row])
    items, ratings = found.scoring.held.of(user)
    tie = Ties(found.data.n_users, len(c)).of(user, items)
    page, removed = ground_truth_page(items, ratings, c, found.scoring.s, found.scoring.near, tie)
    star = dict(zip(items.tolist(), ratings.tolist(), strict=True))

    def line(item: int) -> str:
        title = clip(c.title[item] or c.ids[item], 44)
        return f"{title:<44}  {clip(c.leaf[item], 18):<18}  {c.brand[item]}".rstrip()

    lines = [
        f"user {found.data.user_ids[user]}",
        "",
        f"prompt    {prompt_text(policy, found, user)}",
        "",
        "true page",
    ]
    lines += [
        f"  {n:3d}  {line(int(i))}" + ("" if np.isnan(star[int(i)]) else f"  {star[int(i)]:g}★")
        for n, i in enumerate(page, 1)
    ]
    if removed:
        lines.append(f"       less {removed} that nearly repeat one above")
    for side, (name, pages) in enumerate(written.items()):
        mine = page_items(pages, found.k)[row]
        marks = [*hits(pages, found.scoring, found.k), brand_hits(pages, found.scoring, found.k)]
        paid = np.full(found.k, np.nan) if rewards is None else rewards.token[side, at]
        so_far = trace(paid)
        kept = np.flatnonzero(mine >= 0)
        sums = ", ".join(
            f"{int(m[row].sum())} {kind}" for kind, m in zip(KINDS, marks, strict=True)
        )
        head = "       hit" if rewards is None else "       hit     r_k   sum/T"
        lines += ["", f"{LABELS[name]}: {sums}", head]
        for k in kept:
            mark = "".join(sign for sign, m in zip(MARKS, marks, strict=True) if m[row, k])
            told = "" if rewards is None else f" {paid[k]:+7.3f} {so_far[k]:+7.3f}"
            lines.append(f"  {k + 1:3d}  {mark:<3}{told}  {line(int(mine[k]))}")
        if len(kept) and rewards is not None:
            lines.append(
                f"  token reward R_f {so_far[kept[-1]]:+.3f}, page reward R_c "
                f"{rewards.total[side, at] - so_far[kept[-1]]:+.3f}"
            )
    return "\n".join(lines)


SHORT = {"sft": "SFT", "ppo": "PageLLM", "compose": "composed"}


def table(found: Found) -> str:
    """Mean hits on a page; each policy's paired difference to the first one, with its 95% interval
    (bootstrap over users)."""
    hit = {name: counts(found, name) for name in found.written("a case study")}
    first, c = next(iter(hit)), found.data.catalogue
    head = "".join(f"{SHORT[name]:>9}" for name in hit)
    rest = "".join(f"  {SHORT[name] + ' - ' + SHORT[first]:<26}" for name in list(hit)[1:])
    lines = [f"{'slots a page':<16}{head}{rest}".rstrip()]
    for i, (kind, of) in enumerate(zip(KINDS, (None, c.leaf_id, c.brand_id), strict=True)):
        if of is not None and not (of >= 0).any():
            none = "".join(f"{'–':>9}" for _ in hit)
            lines.append(f"{kind:<16}{none}  no item of {found.dataset} has one")
            continue
        line = f"{kind:<16}" + "".join(f"{x[i].mean():9.3f}" for x in hit.values())
        for name in list(hit)[1:]:
            mean, low, high = difference([hit[name][i]], [hit[first][i]])
            cell = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            line += f"  {cell:<26}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def run(config: Config) -> str:
    """Print and return the text.

    Raises PageLLMError if a stage that is needed is missing, or a user has no page.
    """
    found = read(
        config.runs, config.run or config.dataset or "synthetic", config.data, config.dataset
    )
    try:
        of = next(iter(found.written("a case study").values())).user
        if config.user:
            names = id_list(config.user, "user")
            known = {found.data.user_ids[u]: row for row, u in enumerate(of.tolist())}
            if strange := [name for name in names if name not in known]:
                raise PageLLMError(
                    f"--user {', '.join(strange)}: no page of theirs in "
                    f"{found.stages['evaluate'].path}; users with held-out items have one, such as "
                    f"{next(iter(known))}"
                )
            rows = np.array([known[name] for name in names])
        else:
            rows = np.sort(
                randomness.rng(config.seed, "casestudy").permutation(len(of))[: config.users]
            )
        judge = found.stages["reward"]
        rewards = rewards_of_rows(found, config, rows) if judge.done else None
    except Missing as missing:
        raise PageLLMError(f"{missing.what}\n  Make it with: {missing.command}") from None
    reader = next(name for name in ("ppo", "sft") if found.stages[name].done)
    policy = Policy.load(found.stages[reader].path)
    cases = [case_text(found, policy, int(row), rewards, at) for at, row in enumerate(rows)]
    text = "\n\n\n".join(cases + [f"all {counted(len(of), 'user')}\n\n{table(found)}"])
    signs = "✓ held out   ≈ a held-out item's category   ◇ a held-out item's brand   "
    told = "sum/T: rewards down to this slot over all slots (Eq. 6)"
    if rewards is None:
        told = f"no reward model, so no rewards: {judge.command} makes one"
    print(f"{text}\n\n{signs}{told}")
    return text


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm casestudy"))
