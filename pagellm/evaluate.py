"""Evaluation: policies -> pages.parquet -> one piece of code that scores them all.

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/ppo
Writes  runs/<run>/evaluate                 <policy>/pages.parquet (user, rank, item, score, page)
                                            <policy>/per_user.parquet, metrics.json, table.txt

    make evaluate                           python -m pagellm.evaluate --dataset synthetic --policies popularity,sft

Every ranking is over the whole catalogue less what the mask takes out, and every test user counts. Equal scores go by
a seeded shuffle. Where runs/<dataset>/baselines lies, its rows are printed below, and a policy beyond three times
EASE stops as a suspected leak. Seconds for the synthetic shop on two CPU cores.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.data.shop import Shop, load
from pagellm.model.policy import MODES, Policy
from pagellm.pages import stats
from pagellm.pages.ranked import (
    RankedPages,
    Scorer,
    audience,
    check_leak,
    check_mask,
    popularity_pages,
    score_row,
    seen_rows,
)
from pagellm.pages.tables import ALL_COLUMNS, COLUMNS, text_table
from pagellm.stage import dist, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, write_json
from pagellm.stage.run import Run, StageConfig, file_id, finished

__all__ = ["Config", "LABELS", "run"]


LABELS = {"popularity": "popularity", "sft": 'SFT = "w/o reward"', "ppo": "PageLLM"}
DIFFERENCE = "PageLLM - SFT"  # the paired row of the table


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write everybody's pages with each policy, score them on held-out items, print the table and some pages."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    policies: str = "popularity,sft,ppo"  # which to evaluate, comma-separated
    split: str = "test"  # held-out rows that count as right: test or valid
    mask: str = "train+valid"  # splits whose items no page may hold; "train":
    # as some papers do. With split=valid always train
    k: int = 20  # slots of a page, decoded one after another
    depth: int = 100  # ranks in all; past the page by the first slot's logits
    mode: str = "greedy"  # greedy, beam, or one_shot (all ranks by the first slot's logits)
    batch: int = 256  # users decoded at once
    n_boot: int = 1000  # bootstrap draws behind an interval
    examples: int = 3  # users whose pages are printed
    quiet: bool = False  # write the files, print nothing

    def __post_init__(self):
        super().__post_init__()
        names = self.policies.split(",")
        check(
            self,
            policies=(
                set(names) <= set(LABELS) and len(set(names)) == len(names),
                f"some of {','.join(LABELS)}",
            ),
            split=(self.split in ("test", "valid"), "test or valid"),
            mask=check_mask(self.mask),
            k=(self.k > 0, "1 or more"),
            depth=(self.depth >= self.k, f"k={self.k} or more"),
            mode=(self.mode in MODES, ", ".join(MODES)),
            batch=(self.batch > 0, "1 or more"),
            n_boot=(self.n_boot > 1, "2 or more"),
            examples=(self.examples >= 0, "0 or more"),
        )


def show_pages(
    shop: Shop, pages: dict[str, RankedPages], held, history, count: int, k: int, seed: int
) -> str:
    """The pages of a few users as people read them: history, held-out items, then each policy's first k."""
    if not pages or not count:
        return ""
    last = list(pages.values())[-1]
    chosen = randomness.rng(seed, "examples").permutation(len(last.user))[:count]
    name_of = [
        title or item for title, item in zip(shop.catalogue.title, shop.catalogue.ids, strict=True)
    ]
    leaf = shop.catalogue.leaf
    lines = []
    for row in sorted(chosen):
        user = int(last.user[row])
        right = set(held.of(user)[0].tolist())
        liked = [
            f"{name_of[i]}" + ("" if np.isnan(r) else f" ({r:.0f}★)")
            for i, r in zip(*history.of(user), strict=True)
        ]
        lines += [
            f"user {shop.user_ids[user]}",
            "  history   " + "; ".join(liked[-6:]),
            "  held out  " + "; ".join(name_of[i] for i in right),
        ]
        for policy, ranked in pages.items():
            lines.append(f"  {LABELS.get(policy, policy)}")
            page = ranked.item[row][: min(k, int(ranked.slots[row]))]
            lines += [
                f"   {'✓' if i in right else ' '}{rank:3d}  {name_of[i]}"
                + (f"  [{leaf[i]}]" if leaf[i] else "")
                for rank, i in enumerate(page.tolist(), 1)
                if i >= 0
            ]
        lines.append("")
    return "\n".join(lines[:-1])


def run(config: Config) -> dict[str, dict[str, dict]]:
    """-> policy -> metric -> {mean, low, high, coverage, count}; {} elsewhere than in the main process."""
    where = {"sft": config.stage("sft", config.source_run), "ppo": config.stage("ppo")}
    shop = load(config.data_dir)
    names, inputs = config.policies.split(","), {"data": file_id(config.data_dir / "source.json")}
    for name in names:
        if name in where:
            inputs[name] = finished(where[name], f"{LABELS[name]} policy", config.make(name))["id"]
    free = ("batch", "examples", "quiet")
    device = dist.start(config.device)
    with Run(config.stage("evaluate"), config, inputs, free) as out:
        if out.done:
            if dist.is_main() and not config.quiet:
                print((out.path / "table.txt").read_text())
            return json.loads((out.path / "metrics.json").read_text())
        scorer = Scorer(shop, config.split)
        history, held = shop.csr("train"), scorer.held
        seen = seen_rows(shop, config.split, config.mask)
        baselines = baselines_of(config)
        users = scorer.users
        if len(users) == 0:
            raise PageLLMError(
                f"{config.data_dir} has no {config.split} rows: nothing to evaluate on"
            )
        results, pages, rows, written = {}, {}, {}, {}
        for name in names:
            if name == "popularity":
                ranked = popularity_pages(shop, users, seen, config.k, config.depth, config.seed)
            elif inputs[name] in written:  # ppo kept sft's weights: its pages are these
                ranked = written[inputs[name]]
            else:
                policy = Policy.load(where[name], device)
                ranked = written[inputs[name]] = policy.rank(
                    users,
                    history,
                    seen,
                    config.k,
                    config.depth,
                    config.mode,
                    config.batch,
                    "" if config.quiet else f"pages of {name}",
                    shop.moments(config.split),
                    config.seed,
                )
            # it has done its share of the pages; the main process scores and writes
            if not dist.is_main():
                continue
            pages[name] = ranked
            rows[name], results[name] = score_row(
                out.path / name, name, ranked, scorer, seen, config.k, config.seed, config.n_boot
            )
            check_leak(name, rows[name], scorer.held.counts()[users], baselines.get("EASE"))
        if not dist.is_main():
            dist.barrier()
            return {}
        text = text_table(results, COLUMNS, LABELS)
        if "sft" in rows and "ppo" in rows:
            results[DIFFERENCE] = {
                metric: stats.paired(
                    rows["ppo"][metric], rows["sft"][metric], config.seed, config.n_boot
                )
                for metric in results["ppo"]
            }
            text = text_table(results, ALL_COLUMNS, LABELS, signed=(DIFFERENCE,))
        short = int((pages[names[-1]].slots < config.k).sum())
        text = (
            f"{config.dataset}: {len(users):,} users, {shop.n_items:,} items, {config.split} split, pages of "
            f"{config.k}; mean over users and its 95% bootstrap interval\n"
            f"{audience(shop, scorer, config.mask, config.split)}\n\n{text}\n"
            + (
                f"\n{short} pages are shorter than {config.k}: no more legal items\n"
                if short
                else ""
            )
            + "\n"
            + show_pages(shop, pages, held, history, config.examples, config.k, config.seed)
            + "\n"
        )
        write_json(out.path / "metrics.json", results)
        with atomic(out.path / "table.txt") as beside:
            beside.write_text(text)
        out.finish(users=len(users))
        if not config.quiet:
            print(text)
            print(
                f"beside: runs of make baselines DATASET={config.dataset}\n\n{text_table(baselines, COLUMNS[:3])}"
                if baselines
                else f"plain baselines beside this: make baselines DATASET={config.dataset}"
            )
        return results


def baselines_of(config: Config) -> dict[str, dict[str, dict]]:
    """The baselines' scores of this data set, if they are there and were made on the same split under the same mask."""
    folder = Path(config.runs) / config.dataset / "baselines"
    if config.split != "test" or not (folder / "done").exists():
        return {}
    made = json.loads((folder / "config.json").read_text())
    if made["config"]["mask"] != config.mask or made["inputs"]["data"] != file_id(
        config.data_dir / "source.json"
    ):
        return {}
    return json.loads((folder / "metrics.json").read_text())


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm.evaluate"))
