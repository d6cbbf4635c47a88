"""Evaluation: every policy's pages, scored by one piece of code.

Reads   data/<dataset>, runs/<run>/sft, ppo and compose, where they are
Writes  runs/<run>/evaluate     <policy>/pages.parquet (user, rank, item, score, page)
                                <policy>/per_user.parquet, metrics.json, versus.json, table.txt

    make evaluate               pagellm evaluate --dataset synthetic --policies popularity,sft

Every ranking is over the whole catalogue less what the mask takes out, and every test user counts.
Ties between equal scores are broken by a seeded random order. Where runs/<run>/baselines or
runs/<dataset>/baselines lies, the last policy is compared with each of its rows, metric by metric,
and a policy that scores more than three times EASE stops as a suspected leak. Seconds for the
synthetic shop on two CPU cores.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from pagellm.data.shop import Shop, load
from pagellm.model.choice import recorded_mode
from pagellm.model.composer import load_composer
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
from pagellm.pages.rerank import Kin
from pagellm.pages.tables import (
    ALL_COLUMNS,
    COLUMNS,
    DAGGER,
    check_decimals,
    per_user,
    text_table,
)
from pagellm.pages.variety import KINDS, STRENGTH, Variety
from pagellm.pages.yardstick import verdict_table, verdicts
from pagellm.stage import dist, hints, randomness
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json, slug, write_json
from pagellm.stage.run import FREE, Run, StageConfig, file_id, finished

__all__ = ["Config", "LABELS", "run"]


LABELS = {
    "popularity": "popularity",
    "sft": 'SFT = "w/o reward"',
    "ppo": "PageLLM",
    "compose": "PageLLM, composed",
}
DIFFERENCE = "PageLLM - SFT"  # the paired row of the table


READ_ALONE = ("batch", "examples", "quiet", "decimals")  # options that change no result


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write everybody's pages with each policy, score them, print the table and some pages."""

    source_run: str = ""  # run whose sft is read; empty: this run (studies share one)
    policies: str = "auto"  # which policies to evaluate, comma-separated: popularity, sft, ppo,
    # compose; auto: popularity and those that are done. Others than before are evaluated anew, in
    # the same place
    split: str = "test"  # held-out rows that count as hits: test or valid
    mask: str = "train+valid"  # splits whose items no page may hold: train+valid, or train as in
    # some papers. With split=valid it is always train
    k: int = 20  # slots of a page, decoded one after another
    depth: int = 100  # ranks written for each user; those after the page are ordered by the first
    # slot's logits
    mode: str = "auto"  # decoding of sft and ppo: greedy, beam, or one_shot (all ranks by the first
    # slot's logits); auto: what validation chose when each was trained
    variety: str = "none"  # method that makes the pages of sft and ppo more varied while they are
    # decoded: none, mmr or energy
    strength: float = STRENGTH  # strength of variety: with mmr, an item identical to one above
    # loses so many nats of log-probability
    candidates: int = 0  # size of the shortlist that pages of sft and ppo are made of: the best
    # items for the first slot, at least `depth` of them. Less work in a large catalogue; 0: the
    # whole catalogue
    batch: int = 256  # users decoded at once
    n_boot: int = 1000  # bootstrap draws for each interval
    decimals: int = 4  # digits after the decimal point, in table.txt
    examples: int = 3  # users whose pages are printed
    quiet: bool = False  # write the files, print nothing

    def __post_init__(self):
        super().__post_init__()
        names = self.policies.split(",")
        check(
            self,
            policies=(
                self.policies == "auto"
                or set(names) <= set(LABELS)
                and len(set(names)) == len(names),
                f"auto, or some of {','.join(LABELS)}",
            ),
            split=(self.split in ("test", "valid"), "test or valid"),
            mask=check_mask(self.mask),
            k=(self.k > 0, "1 or more"),
            depth=(self.depth >= self.k, f"k={self.k} or more"),
            mode=(self.mode in ("auto", *MODES), f"auto, {', '.join(MODES)}"),
            variety=(self.variety in KINDS, ", ".join(KINDS)),
            candidates=(
                self.candidates == 0 or self.candidates > 0 and self.variety == "none",
                "0, or above 0 without variety, which looks at the whole catalogue",
            ),
            strength=(0 <= self.strength < np.inf, "0 or more"),
            batch=(self.batch > 0, "1 or more"),
            n_boot=(self.n_boot > 1, "2 or more"),
            decimals=check_decimals(self.decimals),
            examples=(self.examples >= 0, "0 or more"),
        )


def show_pages(
    shop: Shop, pages: dict[str, RankedPages], held, history, count: int, k: int, seed: int
) -> str:
    """The pages of a few users for people to read: history, held-out items, each policy's page."""
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


def make_room(config: Config) -> None:
    """If other policies were evaluated here, take their results away, and say so.

    Where other options differ too nothing is done: `Run` refuses, and says which.
    """
    folder = config.stage("evaluate")
    if not (folder / "config.json").exists():
        return
    before, now = read_json(folder / "config.json")["config"], asdict(config)
    if before.get("policies") == config.policies:
        return
    same = {*FREE, *READ_ALONE, "policies", "mode"}
    if any(before.get(name, now[name]) != now[name] for name in now.keys() - same):
        return
    try:
        with FileLock(folder / "lock", blocking=False):
            print(
                f"evaluate: {folder} held {before.get('policies')}; {config.policies} are "
                "evaluated in its place",
                flush=True,
            )
            (folder / "done").unlink(missing_ok=True)
            for name in set(before["policies"].split(",")) - set(config.policies.split(",")):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "config.json").unlink()
    except Timeout:
        return  # `Run` says that another process works here


def run(config: Config) -> dict[str, dict[str, dict]]:
    """-> policy -> metric -> {mean, low, high, coverage, count}; {} but in the main process."""
    config, where = with_policies(config)
    config, modes = with_modes(config, where)
    shop = load(config.data_dir)
    names, inputs = config.policies.split(","), {"data": file_id(config.data_dir / "source.json")}
    for name in names:
        if name in where:
            make = config.make(name, where[name].parent.name)
            inputs[name] = finished(where[name], f"{LABELS[name]} policy", make)["id"]
    device = dist.start(config.device)
    if dist.is_main():
        make_room(config)
    with Run(config.stage("evaluate"), config, inputs, READ_ALONE) as out:
        if out.done:
            results = read_json(out.path / "metrics.json")
            made = read_json(out.path / "config.json")["config"]
            if dist.is_main() and not config.quiet:
                print(
                    (out.path / "table.txt").read_text()
                    if config.decimals == made.get("decimals", 4)
                    else text_table(
                        results, ALL_COLUMNS, LABELS, (DIFFERENCE,), decimals=config.decimals
                    )
                )
                print(spent(config, where))
            return results
        scorer = Scorer(shop, config.split)
        seen, users = seen_rows(shop, config.split, config.mask), scorer.users
        plain = baselines_of(config)
        if len(users) == 0:
            raise PageLLMError(f"{config.data_dir} has no {config.split} rows: nothing to evaluate")
        results, pages, rows = {}, {}, {}
        written: dict[tuple[str, str | None], RankedPages] = {}
        for name in names:
            key = inputs.get(name, name), modes.get(name)
            if key in written:  # ppo kept sft's weights: its pages are these
                ranked = written[key]
            else:
                mode = modes.get(name, "")
                ranked = pages_of(config, name, mode, where, shop, scorer, device)
                written[key] = ranked
            # Every process has made its share of the pages; the main one scores and writes.
            if not dist.is_main():
                continue
            pages[name] = ranked
            rows[name], results[name] = score_row(
                out.path / name, name, ranked, scorer, seen, config.k, config.seed, config.n_boot
            )
            n_labels = scorer.held.counts()[users]
            check_leak(name, rows[name], n_labels, plain.summary.get("EASE"))
        if not dist.is_main():
            dist.barrier()
            return {}
        columns: tuple[str, ...] = COLUMNS
        signed: tuple[str, ...] = ()
        if "sft" in rows and "ppo" in rows:
            results[DIFFERENCE] = gained(config, rows["ppo"], rows["sft"])
            columns, signed = ALL_COLUMNS, (DIFFERENCE,)
        table = text_table(results, columns, LABELS, signed=signed, decimals=config.decimals)
        table += f"\n{DAGGER}\n" if "†" in table else ""
        versus = compared(config, rows, plain)
        text = in_words(config, modes, shop, scorer, pages, table)
        write_json(out.path / "metrics.json", results)
        write_json(out.path / "versus.json", versus)
        with atomic(out.path / "table.txt") as beside:
            beside.write_text(text + said_of_plain(config, names[-1], plain, versus))
        out.finish(users=len(users), modes=modes)
        if not config.quiet:
            print((out.path / "table.txt").read_text())
            print(spent(config, where))
        return results


def spent(config: Config, where: dict[str, Path]) -> str:
    """Processor seconds of every finished stage behind this table, from its last start to its end.

    They are those of one process of each stage, all threads together, without the start of Python.
    Stages of older versions recorded none and are left out; "" if no stage recorded any.
    """
    folders = [config.stage(name, config.source_run) for name in ("baselines", "pretrain", "sft")]
    folders += [config.stage("reward", config.source_run), where["ppo"], where["compose"]]
    found = []
    for folder in (*folders, config.stage("evaluate")):
        if (folder / "done").exists():
            seconds = read_json(folder / "done").get("cpu_seconds")
            found += [] if seconds is None else [(folder.name, seconds)]
    parts = [f"{name} {seconds:.0f}" for name, seconds in found]
    total = f"; {sum(seconds for _, seconds in found):.0f} in all"
    return f"processor seconds: {', '.join(parts)}{total}" if found else ""


def gained(config: Config, rows: dict, base: dict) -> dict[str, dict]:
    """metric -> paired difference of two rows; p_holm is corrected over the metrics."""
    found = [
        {"metric": m} | stats.paired(rows[m], base[m], config.seed, config.n_boot)
        for m in rows
        if m in base and not np.isnan(rows[m]).all()
    ]
    return {r.pop("metric"): r for r in stats.with_holm([r | {"of": ""} for r in found], "of")}


def with_policies(config: Config) -> tuple[Config, dict[str, Path]]:
    """The config with its policies named, and where each of them lies."""
    where = {
        "sft": config.stage("sft", config.source_run),
        "ppo": config.stage("ppo"),
        "compose": config.stage("compose"),
    }
    if config.policies != "auto":
        return config, where
    done = {name for name, path in where.items() if (path / "done").exists()}
    names = [name for name in where if name in done] or ["sft"]  # where none is, an error says how
    return replace(config, policies=",".join(["popularity", *names])), where


def with_modes(config: Config, where: dict[str, Path]) -> tuple[Config, dict[str, str]]:
    """The mode in which each network is decoded. The config names it where it is one for all."""
    modes: dict[str, str] = {}
    for name in ("sft", "ppo"):
        if name in config.policies.split(","):
            modes[name] = recorded_mode(where[name]) if config.mode == "auto" else config.mode
    one = set(modes.values())
    return replace(config, mode=one.pop() if len(one) == 1 else config.mode), modes


def pages_of(
    config: Config,
    name: str,
    mode: str,
    where: dict[str, Path],
    shop: Shop,
    scorer: Scorer,
    device,
) -> RankedPages:
    """One policy's pages of all users who have held-out items. mode: of decoding, for sft, ppo"""
    users, seen = scorer.users, seen_rows(shop, config.split, config.mask)
    if name == "popularity":
        return popularity_pages(shop, users, seen, config.k, config.depth, config.seed)
    if name == "compose":
        composer = load_composer(
            where[name],
            shop,
            lambda policy, run: config.stage(policy, run or config.source_run),
            device,
            file_id(config.data_dir / "source.json"),
            config.make(name, where[name].parent.name),
        )
        return composer.rank(users, seen, config.k, config.depth)
    policy = Policy.load(where[name], device)
    dist.cut(policy.model, config.parallel)
    return policy.rank(
        users,
        shop.csr("train"),
        seen,
        config.k,
        config.depth,
        mode,
        config.batch,
        "" if config.quiet else f"pages of {name}",
        shop.moments(config.split),
        config.seed,
        None
        if config.variety == "none"
        else Variety(Kin.of(shop.catalogue, scorer.near), config.variety, config.strength),
        config.candidates,
    )


def is_plain(done: Path) -> bool:
    """Whether the stage compose took the pages of the plain row."""
    return bool(read_json(done).get("plain_pages", False))


def in_words(
    config: Config,
    modes: dict[str, str],
    shop: Shop,
    scorer: Scorer,
    pages: dict[str, RankedPages],
    table: str,
) -> str:
    """What table.txt says: who is scored, how, the table, the pages of some users."""
    how = ", ".join(f"{name} {mode}" for name, mode in modes.items())
    varied = f", variety {config.variety} {config.strength:g}" if config.variety != "none" else ""
    short = f", {config.candidates} candidates" if config.candidates else ""
    decoded = f"decoding: {how}{varied}{short}\n" if modes else ""
    if "compose" in config.policies.split(",") and is_plain(config.stage("compose") / "done"):
        decoded += (
            "composed pages: those of ALS+facts with MMR, since validation found none better\n"
        )
    last = list(pages.values())[-1]
    cut = int((last.slots < config.k).sum())
    shorter = f"{hints.counted(cut, 'page')} shorter than {config.k} slots: no more legal items"
    note = f"\n{shorter}\n" if cut else ""
    examples = show_pages(
        shop, pages, scorer.held, shop.csr("train"), config.examples, config.k, config.seed
    )
    return (
        f"{config.dataset}: {hints.counted(len(scorer.users), 'user')}, "
        f"{hints.counted(shop.n_items, 'item')}, {config.split} "
        f"split, pages of {config.k}; mean over users and its 95% bootstrap interval\n"
        f"{audience(shop, scorer, config.mask, config.split)}\n{decoded}\n{table}\n{note}\n"
        f"{examples}\n"
    )


@dataclass(frozen=True)
class Plain:
    """The rows of `pagellm baselines`: summaries, and every user's scores; {} if there are none."""

    summary: dict[str, dict[str, dict]]
    scores: dict[str, dict[str, np.ndarray]]


def compared(config: Config, rows: dict[str, dict], plain: Plain) -> list[dict]:
    """The last policy against every plain row that was scored on the same users."""
    ours = list(rows.values())[-1]
    same = {
        name: [scores]
        for name, scores in plain.scores.items()
        if len(scores["user"]) == len(ours["ILD"])
    }
    return verdicts([ours], same, ALL_COLUMNS, config.seed, config.n_boot)


def said_of_plain(config: Config, name: str, plain: Plain, versus: list[dict]) -> str:
    """The plain rows, and where the last policy is ahead of them, level, unclear or behind."""
    command = hints.command("baselines", config.dataset)
    if not plain.summary:
        return f"\nplain baselines beside this: {command}\n"
    return (
        f"\nplain rows of {command}\n\n{text_table(plain.summary, COLUMNS[:3])}\n\n"
        f"{verdict_table(versus, LABELS[name])}\n"
    )


def baselines_of(config: Config) -> Plain:
    """The plain rows, if they were made on the same split under the same mask.

    Those of this run, else those of the run that is named as the data set.
    """
    folder = config.stage("baselines")
    if not (folder / "done").exists():
        folder = Path(config.runs) / config.dataset / "baselines"
    if config.split != "test" or not (folder / "done").exists():
        return Plain({}, {})
    made = json.loads((folder / "config.json").read_text())
    data = file_id(config.data_dir / "source.json")
    if made["config"]["mask"] != config.mask or made["inputs"]["data"] != data:
        return Plain({}, {})
    names = json.loads((folder / "done").read_text())["rows"]
    scores = {name: per_user(folder / slug(name) / "per_user.parquet") for name in names}
    return Plain(json.loads((folder / "metrics.json").read_text()), scores)


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm evaluate"))
