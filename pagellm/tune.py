"""Choose everything that a shop's pages need, on validation rows alone, within some minutes.

Reads   data/<dataset>
Writes  runs/<run>/preset/<stage>   what was found, read by the stages of this run from then on
        runs/<run>/tune             plan.json, choice.json, table.txt, the trials and their scores

    pagellm tune --dataset mine --minutes 15

Short tests time a factorisation, a training step and a page on this machine. From these times and
the seconds that are left it makes a plan that fits into the minutes, part by part, and writes it to
plan.json. An interrupted run follows the parts that are written and ends with the same bytes. It
chooses, in this order:

1. Plain models: settings of EASE, ALS, ALS+facts and ALS+ratings.
2. The start of the network: the best factorisation's rows; its width, its prompts, its decoding.
3. Pre-training on texts, SFT (learning rate; early stopping), composed pages with and without the
   language model, PPO paid by their outcome model. A stage is kept if a paired 95% interval says
   that it adds something, and if neither Recall@20 nor NDCG@100 falls by more than 1%. Otherwise it
   is left out. Composed pages and the policy's own are two ways of making a page: of these the one
   is taken whose worst relative difference to the other is best.

No test row is read.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pagellm import sft
from pagellm.baselines.compare import RATED, Workbench
from pagellm.baselines.compare import Config as PlainConfig
from pagellm.data.shop import Shop, load
from pagellm.model.networks import SIZES
from pagellm.model.plain import GRIDS, grid_of
from pagellm.model.policy import Policy, PromptStyle
from pagellm.ppo_gate import CLOSED
from pagellm.stage import dist
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check
from pagellm.stage.files import atomic, read_json, write_json
from pagellm.stage.run import Run, StageConfig, file_id
from pagellm.tuning import plan as planning
from pagellm.tuning.plan import (
    LOOKS,
    SHARES,
    Costs,
    Facts,
    Plain,
    Seconds,
    Steps,
    Written,
    epochs_for,
    plan_facts,
    plan_plain,
    plan_steps,
    size_of,
)
from pagellm.tuning.trials import SHOWN, STAGES, Bench, better, compared, pays, write_preset

__all__ = ["Config", "run"]

Scores = dict[str, np.ndarray]
FEW = 24  # items of history that a prompt shows by default
NEARLY = 0.005  # share of ALS's validation NDCG@100 that fewer factors may lose
ALS_FACTORS = GRIDS["ALS"]["factors"]
# Options of SFT that every start has; small steps keep what the factorisation knows.
GENTLE = {"row_lr": 0.1, "dropout": 0.3, "label_share": 0.2, "patience": 3}


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Choose factorisation, start, stages and decoding on validation; keep them as a preset."""

    minutes: float = 15.0  # minutes that the whole search may take on this machine; an estimate of
    # each trial decides what fits
    k: int = 20  # slots of a page

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            minutes=(self.minutes > 0, "above 0"),
            k=(0 < self.k <= 100, "1 to 100"),
            preset=(self.preset in ("auto", "none"), "auto or none: tune makes one"),
        )

    @property
    def kept(self) -> Path:
        """Directory of the preset that is made."""
        return self.stage("preset")


class Tuning:
    """What has been tried so far, and what every stage added."""

    def __init__(self, config: Config, shop: Shop, written: Written):
        self.config, self.shop, self.written = config, shop, written
        self.size = size_of(shop)
        self.plain: Plain = written.part("plain", Plain, self.plan_plain)
        self.seconds = Seconds(**self.plain.seconds)
        self.fit = 0.0  # seconds of a fit of ALS+facts, once `facts` is known
        self.bench = Bench(config, shop, self.plain.judged, config.k)
        self.tried: list[dict] = []
        self.stages: list[dict] = []
        self.presets: dict[str, dict[str, Any]] = {}
        self.trial_of: dict[str, str] = {}  # stage -> the trial whose work is kept

    def plan_plain(self, left: float) -> Plain:
        """The first part of the plan. The probe's own seconds are a part of the first share."""
        c = self.config
        run = f"{c.run or c.dataset}/tune/probe"
        return plan_plain(planning.measure(c, self.shop, run, c.minutes), c.minutes, self.size)

    def facts(self, fit: Callable[[], object]) -> Facts:
        """The second part. fit: fits ALS+facts with the settings of ALS."""

        def make(left: float) -> Facts:
            seconds = planning.timed(fit)
            room = left - seconds - self.config.minutes * 60 * (1 - SHARES["plain"])
            return plan_facts(seconds, self.seconds.rank, room, self.size)

        found = self.written.part("facts", Facts, make)
        self.fit = found.fit
        return found

    def steps(self, style: PromptStyle, mode: str) -> Steps:
        """The third part, for the start that was chosen."""

        def make(left: float) -> Steps:
            before = self.written.spent()
            costs = step_costs(self, style, mode, self.fit)
            left -= self.written.spent() - before
            return plan_steps(costs, self.seconds.cube, left, self.size, mode)

        return self.written.part("steps", Steps, make)

    def note(self, stage: str, what: str, scores: Scores) -> None:
        """Something was tried: keep and print its means."""
        means = {m: round(float(np.nanmean(scores[m])), 5) for m in SHOWN if m in scores}
        self.tried.append({"stage": stage, "what": what, **means})
        told = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"  {stage}: {what}: {told}", flush=True)

    def judge(
        self,
        stage: str,
        against: str,
        ours: Scores,
        before: Scores,
        by: tuple[str, ...] = SHOWN,
        decides: bool = True,
        instead: bool = False,
    ) -> bool:
        """Whether a stage pays; keep and print what it adds.

        decides  False: the comparison is for the reader, nothing is left out because of it
        instead  whether it makes pages in another way, so that one of the two has to be taken
        """
        added = compared(ours, before, self.config.seed)
        kept = better(ours, before) if instead else pays(added, by)
        row = {"stage": stage, "against": against, "added": added, "kept": kept}
        self.stages.append(row | {"decides": decides, "instead": instead})
        print(stage_line(self.stages[-1]), flush=True)
        return kept

    def skip(self, stage: str, why: str) -> None:
        """A stage that was not tried."""
        self.stages.append({"stage": stage, "against": "", "added": {}, "kept": False, "why": why})
        print(stage_line(self.stages[-1]), flush=True)


def stage_line(row: Mapping) -> str:
    """What one stage added, in one line."""
    if not row["added"]:
        return f"{row['stage']}: not tried: {row['why']}"
    parts = [
        f"{m} {x['difference']:+.4f} [{x['low']:+.4f}, {x['high']:+.4f}]"
        for m, x in row["added"].items()
    ]
    told = ("kept; " if row["kept"] else "left out; ") if row["decides"] else ""
    return f"{row['stage']} against {row['against']}: {told}{'; '.join(parts)}"


def around(grid: dict[str, tuple], settings: dict, reach: int = 1) -> dict[str, tuple]:
    """The grid's values near some settings; names without settings keep all of theirs."""
    out = {}
    for name, values in grid.items():
        if name in settings and settings[name] in values:
            at = values.index(settings[name])
            out[name] = values[max(0, at - reach) : at + reach + 1]
        else:
            out[name] = values
    return out


def narrowed(tried: Mapping[str, float], settings: dict) -> dict:
    """Settings of ALS with the fewest factors among those tried that are nearly as good.

    tried     trials.json: "ALS {settings}" -> validation NDCG@100
    settings  the best; only their factors may change

    Fits of a narrow model are cheap, so that more settings of ALS+facts and ALS+ratings fit into
    the minutes. The search of ALS+facts may widen it again.
    """
    best = tried[f"ALS {json.dumps(settings)}"]
    found = {f: tried.get(f"ALS {json.dumps(settings | {'factors': f})}") for f in ALS_FACTORS}
    near = [f for f, value in found.items() if value is not None and value >= (1 - NEARLY) * best]
    return settings | {"factors": min(near)}


def plain_models(t: Tuning) -> tuple[str, Scores]:
    """Search the settings of every plain model; returns the best one and its scores."""
    c = t.config
    where: dict[str, Any] = {
        "dataset": c.dataset,
        "data": c.data,
        "runs": c.runs,
        "seed": c.seed,
        "k": c.k,
    }
    bench = Workbench(PlainConfig(run=c.run, rerank="", depth=t.bench.depth, **where))
    chosen: dict[str, dict] = {"popularity": {"settings": {}}}
    scores: dict[str, Scores] = {}
    most = dict(t.plain.trials)
    path, base = t.bench.folder / "trials.json", {}
    for name in ("EASE", "ALS", "ALS+facts", "ALS+ratings"):
        if name == "ALS+facts":
            base = narrowed(read_json(path), chosen["ALS"]["settings"])
            most |= t.facts(partial(bench.fit, name, base)).trials
        trials, grid = most[name], grid_of(name, t.shop.n_items)
        if name != "EASE":
            kept = tuple(f for f in grid["factors"] if f in t.plain.factors)
            grid |= {"factors": kept or grid["factors"][:1]}
            if name == "ALS+facts":
                grid = around(grid, base)
            elif name == "ALS+ratings":
                grid |= {key: (base[key],) for key in GRIDS["ALS"]}
        if trials:
            chosen[name], fitted = bench.choose(name, path, grid, trials)
        elif name in ("ALS+facts", "ALS+ratings") and (name == "ALS+facts" or t.size.rated):
            chosen[name] = {"settings": base if name == "ALS+facts" else base | RATED}
            fitted = bench.fit(name, chosen[name]["settings"])
        else:
            t.skip(name, "no ratings" if name == "ALS+ratings" else "no time")
            continue
        scores[name] = t.bench.scores(
            name, partial(bench.rank, fitted, t.bench.users, t.bench.seen)
        )
        t.note("plain", name, scores[name])
    c.kept.mkdir(parents=True, exist_ok=True)
    found = {n: {"settings": r["settings"]} for n, r in chosen.items()}
    write_json(c.kept / "baselines.json", found)
    names = [n for n in GRIDS if n in chosen]
    t.presets["baselines"] = {
        "models": ",".join(names),
        "settings": str(c.kept / "baselines.json"),
        "versus": "ALS+facts",
    }
    t.presets["compose"] = {"settings": str(c.kept / "baselines.json")}
    best = max(scores, key=lambda n: np.nanmean(scores[n]["NDCG@100"]))
    return best, scores[best]


def start_options(t: Tuning, best: str) -> dict[str, Any]:
    """Options of pretrain that begin from the best factorisation (EASE has none: ALS+facts)."""
    name = best if best.startswith("ALS") else "ALS+facts"
    s = read_json(t.config.kept / "baselines.json")[name]["settings"]
    out = {"rows": "als", "pool": True, "steps": 0, "alpha0": s["alpha0"], "reg": s["reg"]}
    out |= {"nu": s["nu"], "facts": 0.0 if name == "ALS" else 0.5, "row_scale": 0.05}
    if name == "ALS+ratings":
        out |= {"rated": True, "facts": s["facts"], "disliked": s["disliked"], "slope": s["slope"]}
    return out


def styles(t: Tuning, size: str) -> list[PromptStyle]:
    """Prompts worth a look: with the user's own row or without, and with more of the history."""
    out = [PromptStyle(FEW, t.size.rated, user) for user in (True, False)]
    # SFT's pages may be longer than those that are shown; the words of a prompt take a few tokens.
    room = SIZES[size].n_ctx - max(t.config.k, sft.Config.max_page) - 16
    longest = min(size_of(t.shop).history, room)
    if longest > FEW:
        out += [PromptStyle(longest, False, user) for user in (True, False)]
    return out


def starts(t: Tuning, best: str, plain: Scores) -> tuple[PromptStyle, str, Scores]:
    """Build the start at every width; returns the best one's prompts, decoding and scores."""
    options, found = start_options(t, best), {}
    for size in t.plain.sizes:
        t.bench.stage("pretrain", f"start-{size}", options | {"size": size})
        for style in styles(t, size):
            scores = t.bench.start(f"start-{size}", style, "one_shot")
            user = "with" if style.use_user else "without"
            t.note("start", f"{size}, {style.max_history} items {user} user", scores)
            found[size, style] = scores
    size, style = max(found, key=lambda key: np.nanmean(found[key]["NDCG@100"]))
    by_mode = {"one_shot": found[size, style]}
    by_mode["greedy"] = t.bench.start(f"start-{size}", style, "greedy")
    t.note("start", f"{size}, slot by slot", by_mode["greedy"])
    # Ties go to one-shot pages: they take one pass.
    slow = float(np.nanmean(by_mode["greedy"]["NDCG@100"]))
    mode = "greedy" if slow > np.nanmean(by_mode["one_shot"]["NDCG@100"]) else "one_shot"
    t.judge("start", best, by_mode[mode], plain, decides=False)
    t.presets["pretrain"] = options | {"size": size}
    t.trial_of["pretrain"] = f"start-{size}"
    return style, mode, by_mode[mode]


def prompted(t: Tuning, style: PromptStyle, mode: str) -> dict[str, Any]:
    """Options of SFT for a start: its prompts and its decoding."""
    base: dict[str, Any] = {"max_history": style.max_history, "use_ratings": style.use_ratings}
    return base | {"use_user": style.use_user, "mode": mode, "k": t.config.k}


def step_costs(t: Tuning, style: PromptStyle, mode: str, fit: float) -> Costs:
    """Seconds of training and of a validation from the start that was chosen: some are run."""
    size = t.presets["pretrain"]["size"]
    users = int((t.shop.csr("train").counts() > 1).sum())
    t.bench.lend("pretrain", t.trial_of["pretrain"], "timed")
    some = GENTLE | prompted(t, style, mode) | {"patience": 0, "eval_users": 64}
    some |= {"lr": 1e-5, "epochs": float(epochs_for(6, users))}
    where = t.bench.where("sft", "timed")
    step = planning.step_seconds(where, lambda: t.bench.stage("sft", "timed", some))
    policy, few = Policy.load(where, t.bench.device), t.bench.users[:64]
    page = planning.timed(lambda: t.bench.pages(policy, mode, few)) / len(few)
    look = page * min(planning.LOOKED, len(t.bench.scorer.users))
    return Costs(fit, t.seconds.step * planning.width_cost(size), step, look)


def texts(t: Tuning, plan: Steps, style: PromptStyle, mode: str, before: Scores) -> Scores:
    """Pre-training steps on what the shop says, where there is time and where they pay."""
    if not plan.pretrain:
        t.skip("pre-training", "no time")
        return before
    gentle: dict[str, Any] = {
        "lr": 5e-4,
        "row_lr": 0.1,
        "eval_every": max(1, plan.pretrain // 6),
        "patience": 3,
    }
    options = t.presets["pretrain"] | gentle | {"steps": plan.pretrain}
    t.bench.stage("pretrain", "texts", options)
    scores = t.bench.start("texts", style, mode)
    t.note("pretrain", f"{plan.pretrain} steps", scores)
    if not t.judge("pre-training", "start", scores, before, ("NDCG@100",)):
        return before
    t.presets["pretrain"], t.trial_of["pretrain"] = options, "texts"
    return scores


def fine_tuning(t: Tuning, plan: Steps, style: PromptStyle, mode: str) -> Scores:
    """SFT at several learning rates, from the start itself upwards; returns the policy's scores."""
    base = prompted(t, style, mode)
    alone = GENTLE | base | {"epochs": 0.0, "patience": 0, "eval_users": 500}
    tried: dict[str, dict[str, Any]] = {"sft-none": alone}
    users = int((t.shop.csr("train").counts() > 1).sum())
    for lr in plan.sft:
        epochs = float(epochs_for(plan.sft_steps, users))
        every = max(1, plan.sft_steps // LOOKS)
        more = {"lr": lr, "epochs": epochs, "eval_every": every, "eval_users": 500}
        tried[f"sft-{lr:g}"] = GENTLE | base | more
    scores = {}
    for name, options in tried.items():
        t.bench.lend("pretrain", t.trial_of["pretrain"], name)
        t.bench.stage("sft", name, options)
        scores[name] = t.bench.policy(name, "sft", mode)
        t.note("sft", name, scores[name])
    best, rates = "sft-none", [name for name in tried if name != "sft-none"]
    if not rates:
        t.skip("SFT", "no time")
    else:
        taught = max(rates, key=lambda name: np.nanmean(scores[name]["NDCG@100"]))
        if t.judge("SFT", "start", scores[taught], scores[best], ("NDCG@100",)):
            best = taught
    t.presets["sft"], t.trial_of["sft"] = tried[best], best
    return scores[best]


def composition(t: Tuning, plan: Steps, policy: Scores, plain: tuple[str, Scores]) -> None:
    """Composed pages without and with the language model."""
    options = t.presets["compose"] | {"k": t.config.k, "eval_users": plan.eval_users}
    options |= {"fold_users": plan.fold_users}
    shared: dict[str, tuple] = {}  # judges, outcome network and plain rows are the same in both
    t.bench.stage("compose", "composed-none", options | {"policy": "none"}, shared=shared)
    alone = t.bench.composed("composed-none", None)
    t.note("compose", "without language model", alone)
    t.judge("compose", plain[0], alone, plain[1], decides=False)
    source = t.trial_of["sft"]
    more = {"policy": "sft", "source_run": t.bench.run_of(source)}
    t.bench.stage("compose", "composed-sft", options | more, shared=shared)
    both = t.bench.composed("composed-sft", t.bench.where("sft", source))
    t.note("compose", "with language model", both)
    name, scores, by = "none", alone, ("Recall@20", "NDCG@100")
    if t.judge("language model in compose", "compose without it", both, alone, by):
        name, scores = "sft", both
    if not t.judge("compose", "the policy's own pages", scores, policy, instead=True):
        return
    t.presets["compose"] = options | {"policy": name}
    t.trial_of["compose"] = f"composed-{name}"


def rewarded(t: Tuning, plan: Steps, mode: str, policy: Scores) -> None:
    """PPO, where there is time and where it pays: it learns what the outcome model would show."""
    if not plan.ppo:
        t.skip("PPO", "no time")
        return
    if "compose" not in t.trial_of:
        t.skip("PPO", "composed pages were left out, and their outcome model would pay it")
        return
    steps = plan.ppo
    options: dict[str, Any] = {"algo": "expert", "item_reward": "outcome", "w_page": 0.0}
    options |= {"sft_coef": 1.0, "label_share": 0.5, "lr": 1e-4, "row_lr": 0.1}
    options["gate_users"] = planning.GATE_USERS
    options |= {"mode": mode, "k": t.config.k, "epochs": 0.001, "min_steps": steps}
    options |= {"eval_every": max(1, steps // 6), "patience": 3}
    lent = {
        "source_run": t.bench.run_of(t.trial_of["sft"]),
        "compose_run": t.bench.run_of(t.trial_of["compose"]),
    }
    stage = t.bench.stage("ppo", "ppo", options | lent)
    if not read_json(stage / "done")["gate"]["open"]:
        t.skip("PPO", CLOSED)
        return
    scores = t.bench.policy("ppo", "ppo", mode)
    t.note("ppo", f"{steps} steps", scores)
    if t.judge("PPO", "the policy's own pages", scores, policy):
        t.presets["ppo"], t.trial_of["ppo"] = options, "ppo"


def keep(t: Tuning, mode: str) -> dict:
    """Write the preset, and make the trials that were chosen the stages of the run."""
    c, kept = t.config, [s for s in STAGES if s in t.trial_of]
    if "compose" not in kept:
        t.presets.pop("compose", None)
    policies = ["popularity", *(s for s in ("sft", "ppo", "compose") if s in kept)]
    t.presets["evaluate"] = {"policies": ",".join(policies), "mode": mode, "k": c.k}
    t.presets["baselines"] |= {"k": c.k}
    why = f"found by pagellm tune --dataset {c.dataset} --minutes {c.minutes:g}, on validation rows"
    for stage, options in t.presets.items():
        write_preset(c.kept / stage, options, why)
    choice = {
        "stages": kept,
        "left_out": [s["stage"] for s in t.stages if not s["kept"] and s.get("decides", True)],
        "mode": mode,
        "added": t.stages,
        "tried": t.tried,
        "options": t.presets,
    }
    write_json(c.kept / "stages.json", {"stages": kept, "left_out": choice["left_out"]})
    for stage in kept:
        t.bench.keep(stage, t.trial_of[stage], c.kept / stage)
    return choice


def table(choice: dict, minutes: float) -> str:
    """What every stage added, for people."""
    lines = [stage_line(row) for row in choice["added"]]
    lines += ["", f"stages of the run: {', '.join(choice['stages'])}"]
    lines += [f"added nothing, or not tried: {', '.join(choice['left_out']) or 'none'}"]
    return "\n".join(lines) + f"\nplanned for {minutes:g} minutes\n"


def run(config: Config) -> dict:
    """Tune; returns what was chosen: "stages", "left_out", "mode", "added", "tried", "options"."""
    shop = load(config.data_dir)
    config = replace(config, preset="none")
    dist.start(config.device)
    if dist.world() > 1:
        raise PageLLMError("tune works in one process: leave NPROC or torchrun out")
    inputs = {"data": file_id(config.data_dir / "source.json")}
    with Run(config.stage("tune"), config, inputs) as out:
        if out.already_done():
            print((out.path / "table.txt").read_text())
            return read_json(out.path / "choice.json")
        began = time.time()
        t = Tuning(config, shop, Written(out.path / "plan.json", config.minutes))
        print(f"tune: the plan is written to {out.path / 'plan.json'}", flush=True)
        best, plain = plain_models(t)
        style, mode, scores = starts(t, best, plain)
        plan = t.steps(style, mode)
        texts(t, plan, style, mode, scores)
        policy = fine_tuning(t, plan, style, mode)
        composition(t, plan, policy, (best, plain))
        rewarded(t, plan, mode, policy)
        choice = keep(t, mode)
        write_json(out.path / "choice.json", choice)
        with atomic(out.path / "table.txt") as beside:
            beside.write_text(table(choice, config.minutes))
        out.finish(minutes=round((time.time() - began) / 60, 2), stages=choice["stages"])
        print((out.path / "table.txt").read_text())
        return json.loads(json.dumps(choice))


if __name__ == "__main__":
    sys.exit(main(Config, run, "pagellm tune"))
