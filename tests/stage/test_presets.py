"""A data set's preset: the command finds it, what was typed overrides it, the run records it."""

import importlib
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest

from pagellm import ppo, sft
from pagellm.__main__ import VERBS
from pagellm.baselines import compare
from pagellm.data import prepare
from pagellm.stage import presets
from pagellm.stage.command import main
from pagellm.stage.config import Options, PageLLMError, parse
from pagellm.stage.run import Run, StageConfig

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "pagellm" / "presets"
FOUND = sorted(
    p.relative_to(PACKAGED).as_posix()
    for p in PACKAGED.rglob("*")
    if p.is_file() and p.suffix != ".json"
)
STUDIES = (
    *("ablation", "backbones", "coldstart", "crossdomain"),
    *("drift", "leaveout"),
)


def command(verb, *argv):
    """The Config that `pagellm <verb> ...` runs with."""
    return parse(importlib.import_module(VERBS[verb]).Config, [*argv], f"pagellm {verb}", verb)


def study(name, *argv):
    """The Config that `python -m experiments.<name> ...` runs with."""
    cls = importlib.import_module(f"experiments.{name}").Config
    return parse(cls, [*argv], f"experiments.{name}", name)


@pytest.mark.parametrize("name", FOUND)
def test_a_command_alone_is_the_command_with_its_preset_written_out(name):
    """sft --dataset toys  =  sft --dataset toys --preset none <words of toys/sft>"""
    dataset, *folder, verb = name.split("/")
    words = shlex.split((PACKAGED / name).read_text(), comments=True)
    if folder:  # of a study
        config = study(*folder, f"--dataset={dataset}")
        assert getattr(config, verb) == f"@{name}"
        assert command(verb, f"@{name}") == command(verb, *words)
        return
    alone = command(verb, "--dataset", dataset)
    spelt = command(verb, "--dataset", dataset, "--preset", "none", *words)
    assert alone.preset == name and replace(alone, preset="none") == spelt
    assert spelt != command(verb, "--dataset", dataset, "--preset", "none")


def test_what_is_typed_overrides_the_preset():
    made = command("sft", "--dataset", "toys", "--lr", "0.5")
    assert made.lr == 0.5 and made.row_lr == command("sft", "--dataset=toys").row_lr == 0.1
    mine = command("sft", "--dataset", "toys", "@beauty-thin/sft")  # a preset named is typed, too
    assert mine.preset == "toys/sft" and (mine.lr, mine.eval_every) == (1e-4, 75)


def test_a_data_set_without_a_preset_has_the_defaults():
    for dataset in ("nobody", "", "../toys", "toys/../toys", "/toys"):
        assert command("sft", f"--dataset={dataset}") == sft.Config(dataset=dataset)


def test_a_config_that_is_built_in_python_takes_no_preset():
    assert sft.Config(dataset="toys").epochs == sft.Config().epochs
    assert parse(sft.Config, ["--dataset", "toys"]) == sft.Config(dataset="toys")


def test_a_preset_of_ones_own_wins_and_any_other_can_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "presets" / "toys" / "sft"
    own.parent.mkdir(parents=True)
    own.write_text("--lr 0.25  # mine")
    made = command("sft", "--dataset", "toys")
    assert (made.preset, made.lr, made.row_lr) == ("presets/toys/sft", 0.25, sft.Config().row_lr)
    for name in ("presets/toys/sft", str(own)):
        assert command("sft", "--preset", name).lr == 0.25
    assert command("sft", "--preset", "toys/sft").row_lr == 0.1  # the package's, by its name
    with pytest.raises(PageLLMError, match="preset toys/sfd cannot be read"):
        command("sft", "--preset", "toys/sfd")
    own.write_text("--lrr 1")
    with pytest.raises(PageLLMError, match="sft: no option --lrr; did you mean --lr"):
        command("sft", "--dataset", "toys")
    own.write_text("--dataset beauty")
    with pytest.raises(PageLLMError, match="preset presets/toys/sft must not set dataset"):
        command("sft", "--dataset", "toys")


def test_the_screen_says_which_preset_was_taken_and_what_it_sets(capsys, monkeypatch):
    """Without what was typed instead, and once for all processes of a job."""
    argv = ["--dataset", "toys", "--lr", "0.5"]
    assert main(ppo.Config, lambda c: None, "pagellm ppo", argv) == 0
    said = capsys.readouterr()
    assert said.out == "" and "--lr" not in said.err.replace("--row_lr", "")
    assert said.err.startswith("pagellm ppo: preset toys/ppo: --epochs 0.15 ")
    kept = shlex.split(said.err.partition("toys/ppo: ")[2])
    assert command("ppo", *argv, "--preset", "none", *kept) == replace(
        command("ppo", *argv), preset="none"
    )
    monkeypatch.setenv("RANK", "1")
    assert main(ppo.Config, lambda c: None, "pagellm ppo", argv) == 0
    assert capsys.readouterr().err == ""


def recorded(path):
    return json.loads((path / "config.json").read_text())["config"]


def test_a_run_records_its_preset_and_does_not_compare_it(tmp_path):
    toys, none = command("sft", "--dataset=toys"), command("sft", "--dataset=nobody")
    with Run(tmp_path / "a", toys, {}):
        assert recorded(tmp_path / "a")["preset"] == "toys/sft"
    with Run(tmp_path / "b", none, {}):
        assert recorded(tmp_path / "b")["preset"] == "none"
    with Run(tmp_path / "a", replace(toys, preset="presets/mine"), {}):
        assert recorded(tmp_path / "a")["preset"] == "toys/sft"


def test_a_run_from_before_there_were_presets_is_carried_on(tmp_path):
    toys = command("sft", "--dataset=toys")
    with Run(tmp_path / "a", toys, {}):
        pass
    path = tmp_path / "a" / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["preset"]
    path.write_text(json.dumps(record))
    with Run(tmp_path / "a", toys, {}):
        pass
    plain = command("sft", "--dataset=toys", "--preset=none")
    record["config"] = {k: v for k, v in asdict(plain).items() if k != "preset"}
    path.write_text(json.dumps(record))
    with Run(tmp_path / "a", plain, {}):
        pass
    with pytest.raises(PageLLMError, match="without the preset toys/sft, add --preset none"):
        Run(tmp_path / "a", toys, {})


@pytest.mark.parametrize("dataset", sorted({name.split("/")[0] for name in FOUND} | {"nobody"}))
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_hands_each_stage_the_preset_of_the_data_set(name, dataset):
    """Those that there are, of stages that the study has options for; what was typed comes last."""
    config = study(name, "--dataset", dataset, "--seeds", "1", "--sft=--lr 0.25")
    folder = f"{dataset}/backbones" if name == "backbones" else dataset
    stages = [f.name for f in fields(config) if f.type is Options]
    assert {"pretrain", "sft"} <= set(stages)
    for stage in stages:
        there = (PACKAGED / folder / stage).is_file()
        assert getattr(config, stage).startswith(f"@{folder}/{stage}") == there
    assert config.sft.endswith("--lr 0.25") and config.seeds == 1
    default = importlib.import_module(f"experiments.{name}").Config
    assert study(name, "--dataset", dataset, "--preset=none") == default(
        dataset=dataset, preset="none"
    )


def test_what_a_study_gives_a_stage_is_what_the_stage_takes_by_itself():
    from experiments.study import overrides

    for dataset in ("toys", "scientific", "nobody"):
        config = study("ablation", "--dataset", dataset)
        assert sft.Config(dataset=dataset, **overrides(sft, config.sft)) == replace(
            command("sft", "--dataset", dataset), preset="auto"
        )
    assert overrides(sft, "@toys/sft --lr 0.25")["lr"] == 0.25
    with pytest.raises(PageLLMError, match="--sft must not set preset\n  Name it as @toys/sft"):
        overrides(sft, "--preset toys/sft")


def test_a_study_sets_its_own_options_whatever_a_preset_says(tmp_path, capsys):
    """What was typed against the study is refused; what a file of options has is left out."""
    from experiments.study import overrides

    file = tmp_path / "sft"
    file.write_text("--lr 0.25 --mode one_shot")
    assert overrides(sft, f"@{file} --epochs 2", {"mode"}) == {"lr": 0.25, "epochs": 2.0}
    assert capsys.readouterr().err == "sft: the study sets mode itself, whatever the preset says\n"
    with pytest.raises(PageLLMError, match="--sft must not set mode: the study does"):
        overrides(sft, f"@{file} --mode one_shot", {"mode"})


def test_a_study_of_the_papers_ppo_begins_with_it_whatever_a_preset_pays(tmp_path, capsys):
    """A preset's reward gives way to that of pairs, and this is said; what is typed rules."""
    from experiments.study import PAIRS_PPO, overrides

    file = tmp_path / "ppo"
    file.write_text("--algo expert --item_reward outcome --w_page 0 --lr 0.25")
    assert overrides(ppo, f"@{file}", (), PAIRS_PPO) == {"lr": 0.25}
    said = capsys.readouterr().err
    assert said.count("whatever the preset says") == 3
    assert "ppo: the study begins with --item_reward pairs, whatever the preset says" in said
    # A reward for hits beside the outcome reward would be refused; the preset's is gone by then.
    own = overrides(ppo, f"@{file} --w_hit 3", (), PAIRS_PPO)
    assert own == {"lr": 0.25, "w_hit": 3.0}
    own = overrides(ppo, f"@{file} --algo rloo --samples 4 --w_page 0", (), PAIRS_PPO)
    assert own == {"lr": 0.25, "algo": "rloo", "samples": 4, "w_page": 0.0}
    capsys.readouterr()
    assert overrides(ppo, "--lr 0.25", (), PAIRS_PPO) == {"lr": 0.25}
    assert overrides(ppo, f"@{file}", set(PAIRS_PPO), PAIRS_PPO) == {"lr": 0.25}
    assert "begins with" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ("ablation", "backbones", "coldstart", "shortlists"))
def test_ppo_is_paid_by_pairs_in_the_studies_that_train_no_outcome_model(name):
    """With every packaged preset: these studies run the stage reward before PPO."""
    from experiments.study import overrides

    module = importlib.import_module(f"experiments.{name}")
    for dataset in sorted({found.split("/")[0] for found in FOUND}):
        config = study(name, "--dataset", dataset)
        own = overrides(ppo, config.ppo, module.FIXED, module.START["ppo"])
        assert ppo.Config(**own).algo == "ppo" and ppo.Config(**own).reads_pairs
        assert not ppo.Config(**own).reads_outcome


@pytest.mark.parametrize("name", ("ablation", "objectives", "prompt_study", "shortlists", "stages"))
def test_a_study_begins_with_every_preset(name, tmp_path):
    """Each packaged preset, and one that `tune` may have kept, gives stages that the study runs."""
    from experiments.study import overrides

    module = importlib.import_module(f"experiments.{name}")
    for dataset in sorted({found.split("/")[0] for found in FOUND}):
        config = study(name, "--dataset", dataset)
        for verb, stage in module.STAGES.items():
            own = overrides(stage, getattr(config, verb), module.FIXED)
            assert not module.FIXED & set(own)
            if (name, verb) == ("stages", "ppo"):
                stage.Config(**module.PAID | own)
    kept = tmp_path / "evaluate"
    kept.write_text("--policies popularity,sft,compose")
    if evaluate := module.STAGES.get("evaluate"):
        assert "policies" not in overrides(evaluate, f"@{kept}", module.FIXED)


def test_a_study_prepares_a_data_set_as_pagellm_prepare_does(tmp_path, monkeypatch):
    from experiments.study import prepared

    made = []
    monkeypatch.setattr(prepare, "run", made.append)
    prepared("toys-thin", "raw", str(tmp_path))
    prepared("toys-thin", "raw", str(tmp_path), "none")
    assert [c.thin_users for c in made] == [11268, 0]
    assert made[0].preset == "toys-thin/prepare" and made[0].raw == "raw"


def test_a_preset_of_prepare_moves_no_byte():
    """It is no part of source.json: the same data, whoever set the options."""
    made = command("prepare", "--dataset=toys-thin")
    assert prepare.recorded(made) == prepare.recorded(replace(made, preset="none"))
    assert prepare.recorded(made)["thin_users"] == 11268


@pytest.mark.parametrize(
    "argv, settings",
    [
        (["--dataset=toys"], "toys/baselines.json"),
        (["--dataset=nobody"], ""),
        (["--dataset=toys", "--settings="], ""),
        (["--dataset=toys", "--settings=none"], ""),
        (["--dataset=toys", "--preset=none"], ""),
        (["--dataset=toys", "--settings=beauty/baselines.json"], "beauty/baselines.json"),
    ],
)
def test_baselines_take_the_settings_that_a_search_found(argv, settings):
    assert command("baselines", *argv).settings == settings
    assert compare.Config(dataset="toys").settings == ""


def test_settings_of_every_data_set_are_those_of_its_models():
    for path in PACKAGED.rglob("baselines.json"):
        name = path.relative_to(PACKAGED).as_posix()
        models = compare.Config().models.split(",")
        assert set(compare.stored(presets.resolve(name), models)) == set(models)


@dataclass(frozen=True, kw_only=True)
class Stage(StageConfig):
    """A stage of a user's own."""

    PRESET_FILES: ClassVar[dict[str, str]] = {"table": "table.json"}

    steps: int = 9  # steps
    fresh: bool = True  # a switch
    table: str = ""  # a file


def test_any_stage_config_finds_presets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "presets" / "a b"  # a name with a space
    folder.mkdir(parents=True)
    (folder / "mine").write_text("--steps 3 --no-fresh --runs 'else where'")
    (folder / "table.json").write_text("{}")
    lines = []
    made = parse(Stage, ["--dataset", "a b"], "mine", "mine", lines.append)
    assert (made.steps, made.fresh, made.runs) == (3, False, "else where")
    assert presets.resolve(made.table) == Path("presets/a b/table.json")
    assert lines[0] == "preset presets/a b/mine: --steps 3 --no-fresh --runs 'else where'"


def test_make_and_the_bare_command_are_one():
    """What `make ppo DATASET=toys` runs is `pagellm ppo --dataset toys --run toys`, and no more."""
    for verb in ("prepare", "pretrain", "sft", "reward", "ppo", "evaluate"):
        printed = subprocess.run(
            ["make", "-n", verb, "DATASET=toys", "RAW="],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        *_, words = printed.partition(f"-m pagellm {verb} ")
        run = [] if verb == "prepare" else ["--run", "toys"]
        assert shlex.split(words.splitlines()[0]) == ["--dataset", "toys", *run]


def test_a_module_of_a_stage_is_the_same_command():
    """python -m pagellm.sft  =  pagellm sft: usage, preset, messages."""

    def said(*words):
        done = subprocess.run(
            [sys.executable, "-m", *words, "--dataset", "toys", "--data", "nowhere"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    assert said("pagellm.sft") == said("pagellm", "sft")
    code, out, err = said("pagellm.data.prepare", "--klcoef", "1")
    assert (code, out) == (2, "") and err.startswith("pagellm prepare: no option --klcoef")
