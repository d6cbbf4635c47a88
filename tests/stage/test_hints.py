"""What a message tells the reader to type works where the reader is."""

import ast
import re
from pathlib import Path

import pytest

from pagellm import ppo, reward, sft
from pagellm.__main__ import GROUPS, VERBS
from pagellm.__main__ import main as front_door
from pagellm.data.shop import load
from pagellm.ppo_setup import sources
from pagellm.serving import export
from pagellm.serving.recommender import Recommender
from pagellm.serving.sources import Sources
from pagellm.stage import hints
from pagellm.stage.config import PageLLMError
from pagellm.stage.run import StageConfig, finished

ROOT = Path(__file__).parents[2]


def test_in_a_checkout_hints_are_targets_of_make(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = StageConfig(dataset="toys", run="mine", data="elsewhere")
    assert config.make("sft") == "make sft DATASET=toys RUN=mine"
    assert StageConfig().make("sft") == "make sft DATASET=synthetic"
    assert hints.prepare("toys").startswith("make prepare DATASET=toys [RAW=")
    assert hints.study("ablation", "toys", "--seeds 3") == (
        'make ablation DATASET=toys ARGS="--seeds 3"'
    )
    assert hints.install("serve") == "pip install 'pagellm[serve]', or run make serve"
    assert hints.another_run() == "RUN=another"


def test_elsewhere_hints_are_commands_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Makefile").touch()  # somebody else's
    config = StageConfig(dataset="toys", run="mine", data="elsewhere")
    assert config.make("sft") == "pagellm sft --dataset toys --run mine --data elsewhere"
    assert StageConfig().make("sft") == "pagellm sft --dataset synthetic"
    assert hints.prepare("toys").startswith("pagellm prepare --dataset toys [--raw ")
    assert hints.study("ablation", "toys").startswith("python -m experiments.ablation")
    assert hints.install("serve") == "pip install 'pagellm[serve]'"
    assert hints.another_run() == "--run another"


def test_a_stage_that_is_read_from_another_run_is_to_be_made_there(tmp_path, monkeypatch):
    """`--run mine` would make it where nobody looks for it."""
    monkeypatch.chdir(tmp_path)
    both = {"dataset": "toys", "run": "mine", "source_run": "base"}
    for want in (
        lambda: sources(ppo.Config(**both)),
        lambda: reward.run(reward.Config(**both)),
        lambda: export.run(export.Config(**both)),
        lambda: export.run(export.Config(**both, policy="sft")),
        lambda: Recommender.load(Sources(**both)),
        lambda: sft.run(sft.Config(dataset="toys", run="mine", start_run="base")),
    ):
        with pytest.raises(PageLLMError) as error:
            want()
        assert "Make it with: pagellm sft --dataset toys --run base" in str(error.value), want
    # The run of the data set's name needs no --run.
    assert StageConfig(dataset="toys", run="mine").make("sft", "toys").endswith("--dataset toys")


def test_the_nearest_name_is_as_near_as_was_asked():
    known = {"epochs": 1, "epoch_size": 2, "device": 3}
    assert hints.nearest("epoch", known) == "epochs" == hints.nearest("epoch", iter(known))
    assert hints.nearest("devices", known, 0.92) == "device" and not hints.nearest("k", known)
    assert not hints.nearest("devices", known, 0.93)  # 12 of 13 letters
    assert hints.nearest("eposize", known) == "epoch_size" and not hints.nearest("x", ())


def test_one_place_looks_for_the_nearest_name():
    found = [p.name for p in (ROOT / "pagellm").rglob("*.py") if "difflib" in p.read_text("utf-8")]
    assert found == ["hints.py"]


def test_a_working_directory_that_is_gone_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert not hints.in_checkout()


def test_a_name_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    """Who forgets --dataset looks for the made-up shop, and reads here what there is."""
    for run in ("autumn", "winter"):
        (tmp_path / "runs" / run / "sft").mkdir(parents=True)
        (tmp_path / "runs" / run / "sft" / "config.json").touch()
    (tmp_path / "data" / "shop").mkdir(parents=True)
    (tmp_path / "data" / "shop" / "source.json").touch()
    told = f"In {tmp_path / 'runs'} there are: autumn, winter. Name one with --dataset or --run."
    with pytest.raises(PageLLMError, match=re.escape(f"  {told}")):
        finished(tmp_path / "runs" / "synthetic" / "sft", "SFT policy", "pagellm sft")
    with pytest.raises(PageLLMError, match="there are: shop. Name one with --dataset."):
        load(tmp_path / "data" / "synthetic")
    # A run that is there lacks a stage: no other run's name helps.
    assert not hints.other_runs(tmp_path / "runs" / "autumn")
    assert not hints.other_runs(tmp_path / "runs" / "autumn" / "storefront")
    assert not hints.other_runs(tmp_path / "nowhere" / "autumn")


def strings(path):
    """Every text of a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_no_message_of_the_package_names_make_by_itself():
    """hints.py does, which looks where the reader is; outside.py stands alone and names both."""
    for path in (ROOT / "pagellm").rglob("*.py"):
        if path.name in ("hints.py", "outside.py"):
            continue
        for text in strings(path):
            assert not re.search(r"\bmake [a-z]+ [A-Z]+=|\bRUN=|python -m pagellm", text), (
                f"{path.name}: {text}"
            )


def test_every_command_of_a_hint_exists():
    targets = set(
        re.findall(r"^([a-z-]+)[ :].* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    alone = {"download", "runfile", "simulator", "journey", "promote", "import-gguf"}
    alone |= {"compare", "track", "runs", "simulate", "update", "forget", "doctor"}
    # steps of `make storefront-distil`
    alone |= {"storefront-teach", "storefront-student", "storefront-prefer"}
    assert {verb.replace(" ", "-") for verb in VERBS} - alone <= targets


def test_help_has_one_line_for_each_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pagellm", "--help"])
    assert front_door() == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for heading, group in GROUPS.items():
        at = lines.index(f"{heading}:")
        shown = lines[at + 1 : at + 1 + len(group)]
        assert all(line.startswith(f"  {verb} ") for line, verb in zip(shown, group, strict=True))


def test_a_command_of_two_words_is_taken_before_that_of_its_first(capsys, monkeypatch):
    """`storefront --help` has options that `storefront page --help` has not."""
    helps = {}
    for words in ("storefront", "storefront page"):
        monkeypatch.setattr("sys.argv", ["pagellm", *words.split(), "--help"])
        assert front_door() == 0
        helps[words] = capsys.readouterr().out
        assert f"usage: pagellm {words} " in helps[words]
    assert "--steps" in helps["storefront"] and "--steps" not in helps["storefront page"]
    monkeypatch.setattr("sys.argv", ["pagellm", "storefront", "pgae", "--user", "x"])
    assert front_door() == 2
    assert "no command 'storefront pgae'; did you mean storefront page?" in capsys.readouterr().err


@pytest.mark.parametrize("argv, code", [(["--version"], 0), ([], 0), (["zzz"], 2), (["sfd"], 2)])
def test_the_front_door(argv, code, capsys, monkeypatch):
    from pagellm import __version__

    monkeypatch.setattr("sys.argv", ["pagellm", *argv])
    assert front_door() == code
    said = capsys.readouterr()
    assert {
        "--version": said.out == f"{__version__}\n",
        "zzz": "no command 'zzz'; pagellm --help lists" in said.err,
        "sfd": "no command 'sfd'; did you mean sft?" in said.err,
    }.get(*argv or [""], "usage: pagellm <command>" in said.out)
