"""Bring a trained run to newer data, with its new users and items, without training it anew.

Reads   runs/<from>/sft and the data that it was made from; data/<new>
Writes  runs/<out>/update   model.pt, the rows before any fit
        runs/<out>/sft      as `pagellm sft` does; runs/<out>/compose, if <from> has composed pages
        runs/<out>/reward, runs/<out>/ppo    if <from> has them: the same networks, new rows

    pagellm prepare --dataset shop-0302 --raw exports/       the whole log, up to now
    pagellm update --from shop-0301 --data shop-0302 --out shop-0302

This takes seconds, and then the time of the fit, if one is wanted.

1. Known users and items keep their rows. They are matched by the shop's own ids, because their
   numbers differ between two data sets.
2. A new item gets a row from its buyers and its words. A new user gets one from what they liked
   (model/fold.py).
3. --steps makes a short fit. A share of each batch (--fresh) are users with new rows. The others
   are drawn from all other users, so that what is known is not forgotten. Validation keeps the
   rows from before the fit or after it, whichever are better.
4. The reward model and PPO's policy get rows for what is new in the same way, from their own. They
   are not fitted. Validation on the new data says which policy writes, as after training.
5. Composed pages are made anew: their judges are plain models, which fit in seconds to minutes.

The same command carries on what was interrupted. The new run is one like any other: evaluate,
recommend, serve, promote and the next update take it.
"""

import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from pagellm import compose, ppo_config, reward, sft
from pagellm.data.shop import Shop, load, source
from pagellm.model.als import item_groups
from pagellm.model.backbone import Backbone
from pagellm.model.choice import choose_mode
from pagellm.model.fold import PARTS, FoldedItems, FoldedUsers, fold_items, fold_users
from pagellm.model.networks import from_state, to_state
from pagellm.model.policy import Policy, PromptStyle
from pagellm.model.vocab import Vocab
from pagellm.stage import dist, hints
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import file_id, read_json
from pagellm.stage.run import Run, StageConfig, finished, load_model_file

__all__ = ["Change", "Config", "change", "run"]

# What comes along as it is but for its rows, in the order in which it is trained anew.
CARRIED: dict[str, Any] = {"reward": reward.Config, "ppo": ppo_config.Config}
CARRIED_WORDS = {"reward": "the reward model", "ppo": "PPO's policy"}
OWN = ("id", "seconds", "cpu_seconds", "peak_mb", "state")  # of `done`: of the run that wrote it


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Bring a trained run to newer data: keep what is known, fold in what is new, fit for a bit."""

    ALIASES: ClassVar[dict[str, str]] = {"from": "source_run", "out": "run"}

    source_run: str = ""  # the run that is brought up to date; it stays as it is
    data: str = "data"  # the new data: a prepared data set's name, or its directory. If you name
    # the data set by --dataset: the directory of prepared data sets
    run: str = ""  # name of the new run; empty: the name of the new data set
    steps: int = 0  # steps of the fit that follows; 0: none
    fresh: float = 0.5  # share of a batch that are users with rows that the run has not seen
    lr: float = 0.3  # learning rate of the fit, as a share of that of the run
    carry: bool = True  # give the reward model and PPO's policy rows too, if the run has them
    compose: bool = True  # make composed pages, if the run has them

    def __post_init__(self):
        if found := prepared_at(self.data):
            object.__setattr__(self, "data", str(found.parent))
            object.__setattr__(self, "dataset", found.name)
        super().__post_init__()
        check(
            self,
            source_run=(bool(self.source_run), "the run to bring up to date: --from RUN"),
            run=((self.run or self.dataset) != self.source_run, "another run than --from"),
            fresh=(0 <= self.fresh <= 1, "from 0 to 1"),
            lr=(self.lr > 0, "above 0"),
        )

    @property
    def before(self) -> Path:
        """Directory of the run that is brought up to date."""
        return Path(self.runs) / self.source_run


def prepared_at(name: str) -> Path | None:
    """The directory of the prepared data set of that name or path; None if there is none."""
    for path in (Path(name), Path("data") / name):
        if name and (path / "source.json").exists():
            return path
    return None


class Change(NamedTuple):
    """What newer data have that older ones had not, and the other way round.

    item, user   (N,), (U,) the old number of each item and user; -1: new
    gone         (items, users) of the older data that the newer have not
    fresh        users with train rows that the older train rows lack
    rows         how many such train rows there are
    leaked       held-out rows that were train rows before: scores on them would be too good
    """

    item: np.ndarray
    user: np.ndarray
    gone: tuple[int, int]
    fresh: np.ndarray
    rows: int
    leaked: int


def change(old: Shop, new: Shop) -> Change:
    """Compare two data sets by the shop's own ids."""

    def numbers(before: list[str], now: list[str]) -> np.ndarray:
        known = {name: n for n, name in enumerate(before)}
        return np.array([known.get(name, -1) for name in now], np.int64)

    item, user = numbers(old.catalogue.ids, new.catalogue.ids), numbers(old.user_ids, new.user_ids)
    gone = old.n_items - int((item >= 0).sum()), old.n_users - int((user >= 0).sum())
    train = old.rows("train", None)
    seen = old.user[train] * old.n_items + old.item[train]
    u, i = user[new.user], item[new.item]
    met = (u >= 0) & (i >= 0) & np.isin(u * old.n_items + i, seen)
    now, held = new.rows("train", None), new.rows(("valid", "test"))
    fresh = np.unique(new.user[now & ~met])
    return Change(item, user, gone, fresh, int((now & ~met).sum()), int((held & met).sum()))


def recorded(config: Config) -> tuple[dict[str, Any], Path]:
    """The config.json of the run's sft, and the directory of the data that it was made from.

    Raises PageLLMError if the run has no finished SFT policy.
    """
    stage, name = config.before / "sft", config.source_run
    if not config.before.exists():
        raise PageLLMError(f"no run {name} in {config.runs}; see them with: pagellm runs")
    finished(stage, "SFT policy", hints.command("sft", run=name))
    made = read_json(stage / "config.json")
    return made, Path(made["config"]["data"]) / made["config"]["dataset"]


def older(config: Config, made: dict[str, Any], path: Path) -> Shop:
    """The data that the run was made from. Raises PageLLMError if they are gone or others."""
    name = config.source_run
    kept = (
        f"\n  Its rows are numbered by these data. Keep {path}, and prepare the new log under "
        "another --dataset name."
    )
    if not (path / "source.json").exists():
        raise PageLLMError(f"{name} was made from {path}, which is gone{kept}")
    if file_id(path / "source.json") != made["inputs"]["data"]:
        raise PageLLMError(f"{name} was made from {path}, which was prepared anew since{kept}")
    return load(path)


def checked(config: Config, old: Shop, new: Shop, path: Path) -> Change:
    """How the data have changed. Raises PageLLMError where an update makes no sense."""
    if file_id(path / "source.json") == file_id(config.data_dir / "source.json"):
        raise PageLLMError(
            f"{config.data_dir} holds the data that {config.source_run} was made from: nothing new"
        )
    splits = [source(p)["config"].get("split") for p in (path, config.data_dir)]
    if splits[0] != splits[1]:
        raise PageLLMError(
            f"{path} was split by {splits[0]}, {config.data_dir} by {splits[1]}: rows held out now "
            f"may have been learnt from\n  Prepare the new data with --split {splits[0]}"
        )
    found = change(old, new)
    for what, numbers in (("items", found.item), ("users", found.user)):
        if (kept := int((numbers >= 0).sum())) < 2 * PARTS:
            raise PageLLMError(
                f"{config.data_dir} shares {kept} {what} with {path}, too few to go by\n"
                "  Are their ids written in the same way? If it is another shop, train a new run."
            )
    if not found.rows and (found.item >= 0).all() and (found.user >= 0).all():
        raise PageLLMError(
            f"{config.data_dir} has no user, item or train row that {path} has not: nothing new"
        )
    return found


def told(found: Change, items: FoldedItems, users: FoldedUsers) -> list[str]:
    """What was kept and folded in, in words."""
    n_items, n_users = int((found.item < 0).sum()), int((found.user < 0).sum())
    bought = int(items.bought.sum())
    lines = [
        f"{hints.counted(len(found.item) - n_items, 'item')} and "
        f"{hints.counted(len(found.user) - n_users, 'user')} keep their "
        f"rows; {hints.counted(found.gone[0], 'item')} and "
        f"{hints.counted(found.gone[1], 'user')} are no longer there; "
        f"{hints.counted(found.rows, 'new train row')} of {hints.counted(len(found.fresh), 'user')}"
    ]
    if n_items:
        lines.append(
            f"{hints.counted(n_items, 'new item')}: {bought:,} folded in from buyers and words, "
            f"{n_items - bought:,} from words alone (known items folded in likewise have a cosine "
            f"of {items.cosine:.2f} to their trained rows)"
        )
    if n_users:
        lines.append(
            f"{hints.counted(n_users, 'new user')} from what they liked (known ones likewise: "
            f"cosine {users.cosine:.2f})"
        )
    if found.leaked:
        lines.append(
            f"warning: train rows of the run held out now: {found.leaked:,}. So validation "
            "and evaluate say too much good; prepare with --split temporal or leave_one_out"
        )
    return lines


def widen(model: Backbone, new: Shop, found: Change, seed: int) -> tuple[FoldedItems, FoldedUsers]:
    """Give a network the rows of the new data, in place; returns what was folded in."""
    tables = [model.item] if model.item_out is None else [model.item, model.item_out]
    liked, groups = new.csr("train"), item_groups(new.catalogue)
    with torch.no_grad():
        items = fold_items([t.detach() for t in tables], found.item, liked, groups, seed)
        users = fold_users(model.user.detach(), found.user, liked, items.space, seed)
    model.item, model.user = nn.Parameter(items.tables[0]), nn.Parameter(users.rows)
    if model.item_out is not None:
        model.item_out = nn.Parameter(items.tables[1])
    model.n_users, model.n_items = new.n_users, new.n_items
    return items, users


def moved(config: Config, state: dict, old: Path, new: Shop, found: Change) -> tuple[Policy, list]:
    """The policy with rows for the new data, and what to tell of it."""
    model = from_state(state)
    items, users = widen(model, new, found, config.seed)
    vocab = Vocab.load(old)
    wider = Vocab(vocab.tokenizer, new.n_users, new.n_items, vocab.times)
    wider.template = vocab.template
    wider.show(vocab.shown, new.catalogue)
    return Policy(model, wider, PromptStyle(**state["style"])), told(found, items, users)


def left_behind(config: Config, made: dict[str, Any]) -> dict[str, str]:
    """Stage -> why it does not come along: the reward model and PPO's policy, where they are."""
    found = {}
    for stage in CARRIED:
        if not (config.before / stage / "done").exists():
            continue
        if not config.carry:
            found[stage] = "--no-carry"
        elif (
            read_json(config.before / stage / "config.json")["inputs"]["data"]
            != (made["inputs"]["data"])
        ):
            found[stage] = "made from other data than the SFT policy"
    return found


def carried(config: Config, stage: str, new: Shop, found: Change) -> None:
    """Write runs/<out>/<stage>: the network of the run before, with rows for the new data."""
    source = config.before / stage
    done, made = read_json(source / "done"), read_json(source / "config.json")
    own = fields_of(CARRIED[stage], made["config"]) | places_of(config)
    own |= {name: "" for name in ("source_run", "reward_run", "compose_run") if name in own}
    inputs = {
        "data": file_id(config.data_dir / "source.json"),
        "before": made["inputs"]["data"],
        stage: done["id"],
    }
    with Run(config.stage(stage), CARRIED[stage](**own), inputs) as out:
        if out.already_done():
            return
        said = {k: v for k, v in done.items() if k not in OWN} | {"carried": config.source_run}
        state = load_model_file(source / "model.pt")
        if stage == "reward":
            trunk = from_state(state)
            widen(trunk, new, found, config.seed)
            out.finish(state | to_state(trunk), **said)
            return
        policy, _ = moved(config, state, source, new, found)
        policy.model.eval()
        if dist.is_main():
            policy.vocab.save(out.path)
        said["decoding"] = choose_mode(policy, new, own["k"])
        out.finish(policy.state(), **said)


def fold(config: Config) -> dict[str, Any]:
    """Write runs/<out>/update; returns the options that the run's sft had."""
    made, path = recorded(config)
    new, stage = load(config.data_dir), config.before / "sft"
    inputs = {
        "data": file_id(config.data_dir / "source.json"),
        "before": made["inputs"]["data"],
        "sft": read_json(stage / "done")["id"],
    }
    # What makes no sense leaves no directory behind; what is done needs the older data no more.
    done = (config.stage("update") / "done").exists()
    found = None if done else checked(config, older(config, made, path), new, path)
    later = ("steps", "fresh", "carry", "compose")  # they concern what follows
    with Run(config.stage("update"), config, inputs, free=later) as out:
        if out.already_done() or found is None:
            return made["config"]
        policy, lines = moved(config, load_model_file(stage / "model.pt"), stage, new, found)
        if dist.is_main():
            policy.vocab.save(out.path)
            print("\n  ".join([f"update: {config.source_run} -> {out.path.parent}", *lines]))
        left = left_behind(config, made)
        for name in CARRIED:
            if (config.before / name / "done").exists() and name not in left:
                carried(config, name, new, found)
        out.finish(
            policy.state() | {"fresh": torch.from_numpy(found.fresh)},
            new_items=int((found.item < 0).sum()),
            new_users=int((found.user < 0).sum()),
            new_rows=found.rows,
            fresh_users=len(found.fresh),
            leaked=found.leaked,
            told=lines,
        )
    return made["config"]


def fields_of(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values that are fields of a Config; the others are of another version."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def places_of(config: Config) -> dict[str, Any]:
    """Where the new run and its data are, for the Config of any stage."""
    shared = ("dataset", "data", "runs", "seed", "device", "save_every", "parallel")
    return {name: getattr(config, name) for name in shared} | {
        "run": config.run or config.dataset,
        "preset": "none",
    }


def fit_config(config: Config, before: dict[str, Any]) -> sft.Config:
    """The options of the fit: the run's own, but for where it begins, its steps and its rate."""
    own = fields_of(sft.Config, before) | places_of(config)
    own |= {"start_run": "", "fresh": config.fresh if config.steps else 0.0}
    if own.pop("updated", False):  # a share of the rate of the run that was trained, not of a fit's
        own["lr"] /= read_json(config.before / "update" / "config.json")["config"]["lr"]
    own |= {"updated": True, "lr": own["lr"] * config.lr}
    if config.steps:
        own["warmup"] = min(own["warmup"], config.steps // 5)
    train = load(config.data_dir).csr("train")
    users = int((train.counts() >= 2).sum())
    return sft.Config(**own | {"epochs": config.steps / max(1, math.ceil(users / own["batch"]))})


def composed(config: Config) -> None:
    """Make composed pages, if the run before has them."""
    stage = config.before / "compose"
    if not config.compose or not (stage / "done").exists():
        return
    own = fields_of(compose.Config, read_json(stage / "config.json")["config"])
    named = {"none": "no policy", "ppo": "the carried PPO policy", "sft": "the updated SFT policy"}
    policy = own["policy"] if own["policy"] in named else "sft"
    if policy == "ppo" and not (config.stage("ppo") / "done").exists():
        policy = "sft"
    print(
        f"update: composed pages of {config.source_run} are made anew, judges and choice, with "
        f"{named[policy]}",
        flush=True,
    )
    compose.run(compose.Config(**own | places_of(config) | {"policy": policy, "source_run": ""}))


def tell_of_stages(config: Config) -> None:
    """Say what became of the reward model and PPO's policy, and how they are trained anew."""
    left = left_behind(config, recorded(config)[0])
    came = [name for name in CARRIED if (config.stage(name) / "done").exists() and name not in left]
    name = config.run or config.dataset
    if came:
        folders = " and ".join(str(config.stage(stage)) for stage in came)
        print(
            f"update: {' and '.join(CARRIED_WORDS[s] for s in came)} got rows for what is new and "
            f"no fit; to train on the new data, remove {folders} and run "
            + ", then ".join(hints.command(stage, config.dataset, name) for stage in came)
        )
    for stage, why in left.items():
        print(
            f"update: {CARRIED_WORDS[stage]} of {config.source_run} stays behind ({why}); to have "
            f"one, run {hints.command(stage, config.dataset, name)}"
        )


def run(config: Config) -> Path:
    """Bring it up to date; returns the directory of the new run."""
    dist.start(config.device)
    if not (config.data_dir / "source.json").exists() and config.dataset == "synthetic":
        # --dataset was not given, so that --data was meant for the data set itself
        name = config.data
        raise PageLLMError(
            f"no prepared data of the name {name}\n  Make it with: "
            f"{hints.prepare(Path(name).name)}{hints.other_data(Path('data') / name)}"
        )
    if config.stage("").resolve() == config.before.resolve():
        raise PageLLMError(
            f"{config.stage('')} and {config.before} are one directory: it would be overwritten\n"
            "  Give the new run another name: --out NAME"
        )
    if config.stage("").is_symlink():
        raise PageLLMError(
            f"{config.stage('')} is a link to {config.stage('').resolve().name}, which would get "
            "files of another run\n  Give the new run another name: --out NAME; then pagellm "
            "promote NAME"
        )
    before = fold(config)
    sft.run(fit_config(config, before))
    composed(config)
    where = config.stage("")
    if dist.is_main():
        tell_of_stages(config)
        named = config.run or config.dataset
        print(
            f"update: {where}; next: {hints.command('evaluate', config.dataset, named)}, then "
            f"pagellm promote {named}",
            flush=True,
        )
    return where


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm update"))
