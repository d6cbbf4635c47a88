"""The command `pagellm`: `pagellm ppo --dataset toys` runs stage `ppo` of data set toys."""

import importlib
import sys

from pagellm import __version__
from pagellm.stage import collector
from pagellm.stage.command import main as run_main
from pagellm.stage.hints import nearest

__all__ = ["GROUPS", "VERBS", "main", "verb_and_rest"]


# Heading -> command -> (module with Config and run, what it does in one line).
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "All of it": {
        "fit": ("pagellm.pipeline", "a log -> pages and a table: prepare, tune, train, evaluate"),
        "tune": ("pagellm.tune", "choose stages and options on validation, within some minutes"),
    },
    "The pipeline, in order": {
        "download": ("pagellm.data.download", "fetch the raw files of a public data set"),
        "prepare": ("pagellm.data.prepare", "raw files -> data/<dataset>: filter, number, split"),
        "pretrain": ("pagellm.pretrain", "train on next tokens and ratings"),
        "sft": ("pagellm.sft", "fine-tune on the pages that users would have liked"),
        "reward": ("pagellm.reward", "train the reward model on pairs of pages"),
        "ppo": ("pagellm.ppo", "train the policy against the reward model"),
        "compose": ("pagellm.compose", "learn what will be picked, and how to make a page of it"),
        "evaluate": ("pagellm.evaluate", "write every user's page and score it on held-out rows"),
    },
    "Every day": {
        "update": (
            "pagellm.update",
            "a run -> newer data: new users and items, without retraining",
        ),
        "promote": ("pagellm.serving.promote", "make a run the live one, if it is not worse"),
    },
    "Upkeep": {
        "doctor": ("pagellm.upkeep.doctor", "is all well here, and what to do if not"),
        "forget": ("pagellm.upkeep.forget", "take a person out of a data set and its runs"),
    },
    "Pages and what they are made of": {
        "recommend": ("pagellm.serving.recommend", "pages of some users or of all, to a file"),
        "serve": ("pagellm.serving.serve", "pages over HTTP and in a browser"),
        "import-gguf": ("pagellm.model.import_gguf", "a GGUF file -> weights for pretrain"),
        "export": ("pagellm.serving.export", "a policy as embeddings, or for transformers"),
        "features": ("pagellm.serving.features", "scores of (user, item) pairs for a ranker"),
        "search": ("pagellm.serving.search", "exact or approximate search over embeddings"),
        "report": ("pagellm.report.report", "everything about a run in one HTML file"),
        "runs": ("pagellm.report.runs", "the runs that are there, and which is live"),
        "compare": ("pagellm.report.compare", "two runs, metric by metric, with intervals"),
        "track": ("pagellm.report.track", "a run's curves in TensorBoard or MLflow"),
        "casestudy": ("pagellm.report.casestudy", "some users' pages, slot by slot"),
    },
    "A page of rows": {
        "journey": ("pagellm.storefront.journey", "Complete Journey -> a shop with orders"),
        "storefront": ("pagellm.storefront.storefront", "all the steps below, and some pages"),
        "storefront build": ("pagellm.storefront.build", "keywords, missions, factors, the scorer"),
        "storefront trees": ("pagellm.storefront.trees", "LightGBM as the ranker of rows"),
        "storefront tune": ("pagellm.storefront.tune", "weights of the score, on validation rows"),
        "storefront evaluate": ("pagellm.storefront.evaluate", "everybody's page of rows, scored"),
        "storefront cache": ("pagellm.storefront.ahead", "rows and pages of everybody, made ahead"),
        "storefront serve": ("pagellm.storefront.serve", "pages of rows over HTTP, in a browser"),
        "storefront teach": (
            "pagellm.storefront.teach",
            "what a teacher writes, kept for a student",
        ),
        "storefront student": ("pagellm.storefront.student", "a small model that writes rows"),
        "storefront prefer": (
            "pagellm.storefront.prefer",
            "the student, by which answer is better",
        ),
        "storefront label": (
            "pagellm.storefront.label",
            "pairs of row and item for people to judge",
        ),
        "storefront judge": (
            "pagellm.storefront.judge",
            "rows judged by rules or a model; a trusted one stops them",
        ),
        "storefront page": ("pagellm.storefront.show", "one page of rows in the terminal"),
    },
    "Comparisons": {
        "baselines": ("pagellm.baselines.compare", "plain recommenders, re-ranked too, one table"),
        "runfile": ("pagellm.baselines.runfile", "score what another library recommends"),
        "judge": ("pagellm.online.judge", "a language model or rules judge pages side by side"),
    },
    "Online tests": {
        "abtest": ("pagellm.online.abtest", "plan or read an A/B test from a log"),
        "simulator": ("pagellm.online.simulator", "an A/B test with simulated visitors"),
        "simulate": ("pagellm.online.simulate", "log pages of an exploring policy, simulated"),
        "ope": ("pagellm.online.ope", "what a policy would earn, from another policy's log"),
    },
}
VERBS = {verb: module for group in GROUPS.values() for verb, (module, _) in group.items()}


def usage() -> str:
    """The text of `pagellm --help`."""
    lines = ["usage: pagellm <command> [--option value ...]", ""]
    for heading, group in GROUPS.items():
        width = max(11, *map(len, group))
        rows = (f"  {verb:<{width}} {line}" for verb, (_, line) in group.items())
        lines += [f"{heading}:", *rows, ""]
    lines += ["pagellm <command> --help   every option of a command", "pagellm --version"]
    return "\n".join(lines)


def verb_and_rest(argv: list[str]) -> tuple[str, list[str]]:
    """The command at the start of argv, of two words where there is such a one, and what follows.

    The command is "" where there is none. `storefront --user x` is `storefront`; `storefront page`
    is a command of its own.
    """
    for n in (2, 1):
        if (verb := " ".join(argv[:n])) in VERBS:
            return verb, argv[n:]
    return "", argv


def main() -> int:
    """Run the command that sys.argv names; -> its exit code."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, rest = verb_and_rest(argv)
    words = argv[0]
    bare = rest[:1] and not rest[0].startswith(("-", "@"))
    if bare and any(name.startswith(f"{verb} ") for name in VERBS):
        verb, words = "", " ".join(argv[:2])  # storefront pgae
    if not verb:
        near = nearest(words, VERBS)
        hint = f"did you mean {near}?" if near else "pagellm --help lists the commands"
        print(f"pagellm: no command {words!r}; {hint}", file=sys.stderr)
        return 2
    with collector.paused():  # a sixth to a quarter of what importing torch takes
        module = importlib.import_module(VERBS[verb])
    return run_main(module.Config, module.run, f"pagellm {verb}", rest)


if __name__ == "__main__":
    sys.exit(main())
