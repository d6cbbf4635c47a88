"""Section of the report: the pages of some users, drawn at random."""

import numpy as np

from pagellm.evaluate import LABELS
from pagellm.model.policy import Policy
from pagellm.report.findings import COMPOSED, PPO, SFT, Found, Missing
from pagellm.report.html import esc, missing_note, text
from pagellm.report.measure import brand_hits, hits, page_items, page_rewards, prompt_text, trace
from pagellm.report.options import Config
from pagellm.stage import randomness

__all__ = ["examples"]

TITLES = {"sft": f"without reward: {SFT}", "ppo": f"with reward: {PPO}", "compose": COMPOSED}


def examples(found: Found, config: Config) -> str:
    """Every policy's page of config.examples users, slot by slot, with hits and token rewards."""
    written = found.written("example users")
    users = next(iter(written.values())).user
    if not config.examples:
        return text("None asked for (--examples 0).")
    note, rewards = "", None
    try:
        rewards = page_rewards(found, config)
        among = rewards.row
    except Missing as missing:
        note, among = missing_note(missing), np.arange(len(users))
    chosen = np.sort(
        randomness.rng(config.seed, "report", "examples").permutation(among)[: config.examples]
    )
    marks = [
        (*hits(p, found.scoring, found.k), brand_hits(p, found.scoring, found.k))
        for p in written.values()
    ]
    items = [page_items(p, found.k) for p in written.values()]
    token = None
    if rewards is not None:
        token = rewards.token[:, np.searchsorted(rewards.row, chosen)]
        low, high = (f(token, axis=(0, 2), keepdims=True) for f in (np.nanmin, np.nanmax))
        heat = 100 * (token - low) / np.maximum(high - low, 1e-9)
        note += text(
            "Heat: token reward r_k, from the lowest (palest) to the highest (strongest) of a "
            "user's pages; after it the sum down to this slot over T (Eq. 6), whose last is "
            "R_f. R_c: page reward (Eq. 5)."
        )
    out = [
        text(
            "Drawn at random, not picked. ✓ a held-out item; ≈ not held out, but of a held-out "
            "item's category; ◇ of a held-out item's brand."
        ),
        note,
    ]
    policy = None
    if rewards is not None:
        policy = Policy.load(found.stages["ppo" if found.stages["ppo"].done else "sft"].path)
    for at, row in enumerate(chosen):
        user = int(users[row])
        pages = []
        for side, name in enumerate(TITLES[name] for name in written):
            page = [items[side][row], *(m[row] for m in marks[side])]
            judged = [None] * 3
            if token is not None and rewards is not None:
                total = rewards.total[side, int(np.searchsorted(rewards.row, row))]
                judged = [token[side, at], heat[side, at], total]
            pages.append(example_page(found, name, *page, *judged))
        hit = ", ".join(
            f"{int(marks[side][0][row].sum())} by {LABELS[name]}"
            for side, name in enumerate(written)
        )
        out.append(
            f"<details{' open' if at < 2 else ''}><summary>user {esc(found.data.user_ids[user])}: "
            f"held-out items found: {esc(hit)}</summary>"
            + ("" if policy is None else text(f"Prompt: {prompt_text(policy, found, user)}"))
            + f"{known(found, user)}<div class=pages>{''.join(pages)}</div></details>"
        )
    return "".join(out)


def title_of(found: Found, item: int) -> str:
    c = found.data.catalogue
    return c.title[item] or c.ids[item]


def known(found: Found, user: int, most: int = 12) -> str:
    """One user's history (its last `most` items) and held-out items, with ratings."""

    def listing(items, ratings) -> str:
        leaf = found.data.catalogue.leaf
        return (
            "<ul class=plain>"
            + "".join(
                f"<li>{esc(title_of(found, i))}{'' if np.isnan(r) else f' ({r:g}★)'}"
                + (f" <span class=quiet>{esc(leaf[i])}</span>" if leaf[i] else "")
                + "</li>"
                for i, r in zip(items.tolist(), ratings.tolist(), strict=True)
            )
            + "</ul>"
        )

    items, ratings = found.data.csr("train").of(user)
    before = f" (the last {most} of {len(items)})" if len(items) > most else ""
    return (
        f"<div class=pages><div><h3>History{before}</h3>"
        f"{listing(items[-most:], ratings[-most:])}</div>"
        f"<div><h3>Ground truth: held out</h3>{listing(*found.scoring.held.of(user))}</div></div>"
    )


def example_page(found: Found, name: str, items, exact, same, brand, token, heat, total) -> str:
    """One page: a strip of its slots' token rewards, then its items with marks for hits.

    items, exact, same, brand, token, heat (k,): item, kinds of hit, token reward r_k, and r_k as a
    percentage of the range of the user's two pages; token, heat and total are None without a
    reward model. total: page reward plus mean token reward
    """
    kept = np.flatnonzero(items >= 0)
    mark = ["✓" if exact[j] else "≈" * int(same[j]) + "◇" * int(brand[j]) for j in kept]
    strip = ""
    if token is not None:
        said = ", ".join(
            f"{j + 1}: {token[j]:.2f}{' ' + m if m else ''}"
            for j, m in zip(kept, mark, strict=True)
        )
        strip = (
            f'<div class=strip role=img aria-label="Token reward by slot: {said}">'
            + "".join(
                f'<span style="--v:{heat[j]:.0f}">{m}</span>'
                for j, m in zip(kept, mark, strict=True)
            )
            + "</div>"
        )
    leaf, rows = found.data.catalogue.leaf, []
    so_far = np.zeros(0) if token is None else trace(token)
    for j, m in zip(kept, mark, strict=True):
        i = int(items[j])
        value = (
            ""
            if token is None
            else (
                f'<span class=value style="--v:{heat[j]:.0f}">{token[j]:+.2f}</span> '
                f"<span class=quiet>{so_far[j]:+.2f}</span> "
            )
        )
        hit = "".join(
            {
                "✓": '<span class=exact title="held out">✓</span> ',
                "≈": '<span class=same title="same category">≈</span> ',
                "◇": '<span class=same title="same brand">◇</span> ',
            }[one]
            for one in m
        )
        rows.append(
            f"<li{' class=exact' if exact[j] else ''}>{value}{hit}{esc(title_of(found, i))}"
            + (f" <span class=quiet>{esc(leaf[i])}</span>" if leaf[i] else "")
            + "</li>"
        )
    sums = (
        f"{int(exact.sum())} exact, {int(same.sum())} same category, {int(brand.sum())} same brand"
    )
    if token is not None and len(kept):
        sums += f"; R_f {so_far[kept[-1]]:+.3f}, R_c {total - so_far[kept[-1]]:+.3f}"
    return (
        f"<div><h3>Page {esc(name)}</h3>{strip}<ol class=page>{''.join(rows)}</ol>"
        f"<p class=quiet>{sums}</p></div>"
    )
