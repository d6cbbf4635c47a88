"""Command lines: every field reachable, every mistake named."""

import errno
import math
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.report import compare
from pagellm.stage import command
from pagellm.stage.command import deferred_signals, main
from pagellm.stage.config import (
    Options,
    PageLLMError,
    check,
    check_numbers,
    field_comments,
    help_text,
    parse,
)
from pagellm.stage.run import StageConfig


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Shared."""

    seed: int = 0  # of every draw


@dataclass(frozen=True, kw_only=True)
class Config(Parent):
    """What the stage does."""

    clip: float = 0.2  # epsilon, a ratio
    # a second line of help
    kl_coef: float = 0.05  # price of a nat
    name: str = ""  # any text; has a # in it
    fresh: bool = True  # yes or no

    def __post_init__(self):
        check(self, clip=(0 < self.clip < 1, "between 0 and 1"))


def test_values_of_every_kind():
    assert parse(Config, []) == Config()
    assert parse(
        Config, ["--clip", "0.3", "--name=a b", "--no-fresh", "--kl-coef", "-1", "--seed", "7"]
    ) == Config(clip=0.3, name="a b", fresh=False, kl_coef=-1.0, seed=7)
    assert parse(Config, ["--fresh"]).fresh and not parse(Config, ["--fresh", "off"]).fresh


@settings(deadline=None)
@given(
    st.integers(),
    st.floats(allow_nan=False),
    st.text().filter(lambda t: not t.startswith(("--", "@"))),
    st.booleans(),
)
def test_a_config_survives_its_command_line(seed, kl_coef, name, fresh):
    argv = ["--seed", str(seed), f"--kl_coef={kl_coef!r}", "--name", name, "--fresh", str(fresh)]
    assert parse(Config, argv) == Config(seed=seed, kl_coef=kl_coef, name=name, fresh=fresh)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--klcoef", "0.1"], "no option --klcoef; did you mean --kl_coef?"),
        (["--zzz"], "no option --zzz; see"),
        (["--clip", "big"], "--clip 'big': want a number"),
        (["--clip", "nan"], "want a number"),
        (["--seed", "1.5"], "want a whole number"),
        (["--fresh", "maybe"], "want true or false"),
        (["--clip"], "--clip needs a value"),
        (["--clip", "--seed", "1"], "--clip needs a value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["clip", "1"], "unexpected 'clip'"),
        (["--clip", "2"], "clip=2.0: want between 0 and 1"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(PageLLMError) as error:
        parse(Config, argv, "pagellm ppo")
    assert message in str(error.value)


def test_help_lists_every_field_with_default_and_meaning():
    text = help_text(Config, "pagellm ppo")
    for piece in (
        "What the stage does.",
        "--seed int",
        "of every draw (default 0)",
        "epsilon, a ratio a second line of help (default 0.2)",
        "--fresh bool",
        '(default "")',
    ):
        assert piece in text
    assert field_comments(Config)["name"] == "any text; has a # in it"


def test_every_field_of_every_stage_is_explained():
    import importlib

    from pagellm.__main__ import VERBS

    for module in VERBS.values():
        config = importlib.import_module(module).Config
        comments = field_comments(config)
        missing = [field.name for field in fields(config) if not comments.get(field.name)]
        assert not missing, f"{module}: no comment on {missing}"


def test_exit_codes(capsys):
    def fail(config):
        raise PageLLMError("no data\n  Make it so")

    def stop(config):
        raise KeyboardInterrupt

    assert main(Config, lambda c: None, "p", []) == 0
    assert main(Config, fail, "p", []) == 2
    assert capsys.readouterr().err == "p: no data\n  Make it so\n"
    assert main(Config, fail, "p", ["--nope"]) == 2
    assert main(Config, stop, "p", []) == 130
    assert main(Config, fail, "p", ["--help"]) == 0


@dataclass(frozen=True)
class Numbers:
    """A stage."""

    batch: int = 1  # pages
    lr: float = 1.0  # rate
    clip: float = 1.0  # limit
    low: float = 0.0  # offset
    flag: bool = False  # switch

    def __post_init__(self):
        check_numbers(self, negative=("low",), infinite=("clip",))


def test_numbers_are_finite_and_not_negative_unless_said():
    Numbers(low=-1.0, clip=math.inf)
    for field, value, want in (
        ("batch", -1, "0 or more"),
        ("lr", math.inf, "finite"),
        ("low", -math.inf, "finite"),
        ("lr", -0.1, "0 or more"),
    ):
        with pytest.raises(
            PageLLMError, match=f"{field}={value!r}: want .*{want}".replace("(", r"\(")
        ):
            Numbers(**{field: value})


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "x", "runs/a"), ("disk is full", "runs/a", "carries on")),
        (OSError(errno.EROFS, "x", "runs/a"), ("cannot write", "runs/a")),
        (OSError(errno.ENOTDIR, "x", "runs/a"), ("runs/a: ", "is a file", "another")),
        (OSError(errno.EEXIST, "x", "runs/a"), ("runs/a: ", "file", "in the way")),
        (OSError(errno.EISDIR, "x", ".a.tmp", None, "runs/a"), ("runs/a: ", "directory", "way")),
        (OSError(errno.ENAMETOOLONG, "x", "runs/a"), ("runs/a: ", "too long")),
        (MemoryError(), ("out of memory", "--batch")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ("out of memory", "--batch")),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            ("out of memory",),
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
            ("another process", "carries on"),
        ),
    ],
)
def test_faults_of_the_machine_are_explained(error, words, capsys):
    def run(config):
        raise error

    assert main(Numbers, run, "stage", []) == 2
    said = capsys.readouterr().err
    assert said.startswith("stage: ") and said.count("\n") == 1 and all(w in said for w in words)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'x' from 'torch._dynamo.utils'"),
        SystemError("error return without exception set"),
    ],
)
def test_an_import_that_fails_for_want_of_memory_is_told_from_one_that_is_missing(
    error, capsys, monkeypatch
):
    def run(config):
        raise error

    with pytest.raises(type(error)):
        main(Numbers, run, "stage", [])
    monkeypatch.setattr(command, "STARVED", 1 << 62)  # more than any machine has left
    assert main(Numbers, run, "stage", []) == 2
    assert "out of memory; lower --batch" in capsys.readouterr().err


def test_what_torch_wraps_is_still_a_full_disk(capsys):
    def run(config):
        try:
            raise OSError(errno.ENOSPC, "x")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos") from None

    assert main(Numbers, run, "stage", []) == 2 and "disk is full" in capsys.readouterr().err


def test_any_other_error_keeps_its_traceback():
    def run(config):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        main(Numbers, run, "stage", [])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_deferred_block(signum, capsys):
    done = []

    def run(config):
        with deferred_signals() as waiting:
            os.kill(os.getpid(), signum)
            done.append(waiting.signum)
        done.append("never")

    before = signal.getsignal(signum)
    assert main(Numbers, run, "stage", []) == 128 + signum
    assert done == [signum] and capsys.readouterr().err.count("stopped by") == 1
    assert signal.getsignal(signum) is before


def test_a_second_signal_does_not_wait(capsys):
    def run(config):
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("still here")

    assert main(Numbers, run, "stage", []) == 143


def test_a_reader_that_goes_away_is_no_error():
    """`pagellm ppo --help | head -1`"""
    command = f"{sys.executable} -m pagellm.ppo --help | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert ended.stderr == "" and ended.stdout.startswith("usage: pagellm ppo")


def test_a_preset_is_overridden_by_the_command_line(tmp_path):
    preset = tmp_path / "preset"
    preset.write_text("# why\n--batch 3 --lr 0.5\n")
    made = parse(Numbers, [f"@{preset}", "--lr", "0.25"])
    assert (made.batch, made.lr) == (3, 0.25)
    assert parse(Numbers, ["--lr=0.25", f"@{preset}"]) == made
    preset.write_text("--bach 3")
    with pytest.raises(PageLLMError, match="did you mean --batch"):
        parse(Numbers, [f"@{preset}"])
    with pytest.raises(PageLLMError, match="preset .*none cannot be read"):
        parse(Numbers, [f"@{tmp_path / 'none'}"])


def test_a_value_may_begin_with_the_sign_of_a_preset(tmp_path):
    """A word behind an option that wants a value is its value; a flag wants none."""

    @dataclass(frozen=True)
    class Words:
        name: str = ""
        flag: bool = False
        n: int = 1

    (tmp_path / "preset").write_text("--n 7")
    made = parse(Words, ["--flag", f"@{tmp_path / 'preset'}", "--name", "@list.txt"])
    assert made == Words("@list.txt", True, 7)
    with pytest.raises(PageLLMError, match="unexpected '@again'"):
        (tmp_path / "preset").write_text("--n 7 @again")
        parse(Words, [f"@{tmp_path / 'preset'}"])


def test_a_later_preset_overrides_an_earlier_one(tmp_path):
    """@theirs @mine: mine is what I asked for last."""
    first, mine = tmp_path / "first", tmp_path / "mine"
    first.write_text("--batch 3 --lr 0.5")
    mine.write_text("--lr 0.25 --low 2")
    made = parse(Numbers, [f"@{first}", f"@{mine}", "--low=1"])
    assert (made.batch, made.lr, made.low) == (3, 0.25, 1)


def test_options_of_a_stage_given_after_its_preset_override_it_one_by_one(tmp_path):
    """A field of kind Options adds up: a preset, then what was typed."""

    @dataclass(frozen=True)
    class Study:
        sft: Options = "--batch 9"
        seeds: int = 3

    preset = tmp_path / "preset"
    preset.write_text("--batch 3 --lr 0.5")
    made = parse(Study, [f"--sft=@{preset}", "--seeds", "1", "--sft=--lr 0.25"])
    assert made.sft == f"@{preset} --lr 0.25" and made.seeds == 1
    inner = parse(Numbers, made.sft.split())
    assert (inner.batch, inner.lr) == (3, 0.25)
    # what a study does by itself is not added
    assert parse(Study, [f"--sft=@{preset}"]).sft == f"@{preset}"
    with pytest.raises(PageLLMError, match="--seeds is given twice"):
        parse(Study, ["--seeds=1", "--seeds=1"])
    assert "--sft Options" in help_text(Study, "study")
    # several words in quotes are a value, also where they begin with --; an option alone is not
    assert parse(Study, ["--sft", "--lr 0.25", "--seeds", "1"]).sft == "--lr 0.25"
    assert parse(Study, ["--sft", "--lr=0.25"]).sft == "--lr=0.25"
    with pytest.raises(PageLLMError, match="--sft needs a value"):
        parse(Study, ["--sft", "--seeds", "1"])


def make(*words):
    """What `make -n` would run, line by line."""
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", *words],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_make_takes_raw_files_from_raw_then_from_data_raw_then_from_beside_the_project(tmp_path):
    here = tmp_path / "project"
    here.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (here / name).symlink_to(Path(__file__).parents[2] / name)

    def raw(*words):
        (line,) = [
            x
            for x in make("-C", str(here), "prepare", "DATASET=toys", *words)
            if "pagellm prepare" in x
        ]
        return shlex.split(line.split("--dataset toys")[1])

    assert raw() == []
    (tmp_path / "shared" / "data" / "toys").mkdir(parents=True)
    assert raw() == ["--raw", "../shared/data/toys"]
    assert raw("RAW=elsewhere") == ["--raw", "elsewhere"] and raw("RAW=") == []
    (here / "data" / "raw" / "toys").mkdir(parents=True)
    assert raw() == []


PAID_BY_OUTCOMES = "--algo expert --item_reward=outcome --w_page 0"


@pytest.mark.parametrize(
    ("args", "stages"),
    [
        ("", ["reward"]),
        ("--lr 1e-4 --item_reward pairs", ["reward"]),
        ("--item_reward outcome", ["compose", "reward"]),
        ("--w_page=0.5 --item_reward=outcome", ["compose", "reward"]),
        ("--w_page 0.0 --item_reward=outcome", ["compose"]),
        (PAID_BY_OUTCOMES, ["compose"]),
    ],
)
def test_make_ppo_first_makes_what_pays_it(tmp_path, args, stages):
    """Whether ARGS or the data set's own preset says so."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(Path(__file__).parents[2] / name)

    def made(*words):
        lines = [
            x.split("pagellm ")[1].split()[0]
            for x in make("-C", str(tmp_path), *words)
            if "-m pagellm " in x
        ]
        assert lines[:3] == ["prepare", "pretrain", "sft"] and lines[-1] == "ppo"
        return lines[3:-1]

    assert made("ppo", "DATASET=mine", f"ARGS={args}") == stages
    (tmp_path / "presets" / "mine").mkdir(parents=True)
    (tmp_path / "presets" / "mine" / "ppo").write_text(f"# --w_page 0\n{args}\n")
    assert made("ppo", "DATASET=mine") == stages


def test_make_calibrates_the_ranker_before_a_teacher_is_paid_by_its_probabilities():
    lines = [x for x in make("storefront-distil", "RUN=none") if "storefront " in x]
    verbs = [x.split("storefront ")[1].split()[0] for x in lines]
    assert [verb for verb in verbs if verb in ("tune", "teach", "student", "prefer")] == [
        "tune", "teach", "student", "prefer",
    ]  # fmt: skip


def test_make_needs_no_run_for_a_log_of_ones_own():
    """And does for an option that only begins like --log."""
    for target in ("abtest", "ope"):
        for args in ("--log sessions.parquet", "--alpha 0.05 --log=sessions.parquet"):
            assert not [
                x for x in make(target, "RUN=none", f"ARGS={args}") if "pagellm evaluate" in x
            ]
    for target, args in (("abtest", ""), ("ope", ""), ("ope", "--logging_temperature 2")):
        assert [x for x in make(target, "RUN=none", f"ARGS={args}") if "pagellm evaluate" in x]


def test_a_mistake_made_while_handling_a_fault_keeps_its_traceback():
    def run(config):
        try:
            raise OSError(errno.EACCES, "x", "runs/a")
        except OSError:
            {}["a mistake of ours"]

    with pytest.raises(KeyError):
        main(Numbers, run, "stage", [])


@dataclass(frozen=True, kw_only=True)
class Service(Config):
    """A command that reads the environment."""

    ENVIRONMENT = "SHOP_"
    SECRET = ("name",)

    dataset: str = "synthetic"  # the data set


def test_a_value_may_begin_with_an_at_sign():
    """`--name @x` is a value; a preset stands where no value is wanted."""
    assert parse(Config, ["--name", "@ids.txt", "--fresh"]).name == "@ids.txt"
    assert parse(Config, ["--name=@ids.txt"]).name == "@ids.txt"
    with pytest.raises(PageLLMError, match="preset nowhere cannot be read"):
        parse(Config, ["--fresh", "@nowhere"])


def test_options_from_toml_environment_and_command_line_each_override_the_one_before(
    tmp_path, monkeypatch
):
    file = tmp_path / "shop.toml"
    file.write_text(
        'seed = 3\ndevice = "cpu"\n[serve]\nclip = 0.5\nfresh = false\n'
        "kl-coef = 1e-3\n[sft]\nx = 1\n"
    )
    prog, argv, told = "pagellm serve", ["--config", str(file)], []
    # device is an option of most commands; where a command has none, it is passed over
    assert parse(Service, argv, prog) == Service(seed=3, clip=0.5, fresh=False, kl_coef=0.001)
    monkeypatch.setenv("SHOP_CLIP", "0.25")
    monkeypatch.setenv("SHOP_NAME", "a secret")
    monkeypatch.setenv("SHOP_DATASET", "")  # empty: as if not set
    monkeypatch.setenv("SHOP_CLIPS", "1")
    made = parse(Service, [*argv, "--seed", "9"], prog, tell=told.append)
    assert (made.clip, made.name, made.dataset, made.seed) == (0.25, "a secret", "synthetic", 9)
    assert told == [
        "environment: SHOP_CLIP=0.25",
        "environment: SHOP_CLIPS is no option of this command; SHOP_CLIP is",
        "environment: SHOP_NAME=...",
    ]
    assert parse(Config, argv, prog).clip == 0.5  # a command without ENVIRONMENT reads none
    told.clear()
    assert parse(Service, [*argv, "--clip=0.75"], prog, tell=told.append).clip == 0.75
    assert told == ["environment: SHOP_CLIPS is no option of this command; SHOP_CLIP is"] + [
        "environment: SHOP_NAME=..."  # and no word of SHOP_CLIP, which was not taken
    ]
    monkeypatch.setenv("SHOP_SEED", "three")
    with pytest.raises(PageLLMError, match="SHOP_SEED of the environment: --seed 'three': want a"):
        parse(Service, [], prog)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[serve]\nclipp = 1", "no option --clipp; did you mean --clip?"),
        ("clip = 0.5", r"clip stands above all tables.*table of its command, such as \[serve\]"),
        ("[server]\nclip = 0.5", r"no table \[serve\]; did you mean it by \[server\]"),
        ("[serve.clip]\nx = 1", r"\[serve.clip\] is a table"),
        ("[serve", "cannot be read"),
        ('[serve]\nseed = "x"', "want a whole number"),
    ],
)
def test_mistakes_in_a_toml_file_are_named(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(PageLLMError, match=f"--config .*a.toml.*{message}"):
        parse(Service, [f"--config={tmp_path / 'a.toml'}"], "pagellm serve")


@pytest.mark.parametrize(
    "text", ["[serve]\nseed = 3", "seed = 3", "# a shop's own\nname = \"it's\""]
)
def test_a_toml_file_as_a_preset_leads_to_config(tmp_path, monkeypatch, text):
    """Its words are no options, or it is no text of words at all."""
    monkeypatch.chdir(tmp_path)
    Path("my shop.toml").write_text(text)
    hint = "A TOML file is given as --config 'my shop.toml'"
    with pytest.raises(PageLLMError, match="preset my shop.toml.*\n.*" + hint) as error:
        parse(Service, ["@my shop.toml"], "pagellm serve")
    if "[" in text:  # and what it says works
        typed = shlex.split(str(error.value).partition("given as ")[2])
        assert parse(Service, typed, "pagellm serve").seed == 3
    Path("shop").write_text("seed = 3")
    with pytest.raises(PageLLMError, match="preset shop: unexpected 'seed'") as error:
        parse(Service, ["@shop"], "pagellm serve")
    assert "--config" not in str(error.value)


def test_config_wants_a_file():
    with pytest.raises(PageLLMError, match="--config needs a TOML file"):
        parse(Service, ["--config"], "pagellm serve")
    with pytest.raises(PageLLMError, match="cannot be read"):
        parse(Service, ["--config", "nowhere.toml"], "pagellm serve")


def test_help_says_where_options_may_stand():
    text = help_text(Service, "pagellm serve")
    assert "--config FILE.toml" in text and "@FILE" in text and "SHOP_SEED" in text
    assert "SHOP_" not in help_text(Config, "pagellm sft")


def test_a_directory_of_a_run_or_of_a_data_set_is_its_name(tmp_path, monkeypatch):
    """`--run runs/autumn/`, as a shell completes it, is `--run autumn`."""
    monkeypatch.chdir(tmp_path)

    def named(*words):
        found = parse(StageConfig, list(words))
        return found.run, found.dataset

    assert named("--run", "runs/autumn/", "--dataset", "./data/toys") == ("autumn", "toys")
    assert named("--run", f"{tmp_path}/runs/autumn") == ("autumn", "synthetic")
    assert named("--run", "autumn/tune/3") == ("autumn/tune/3", "synthetic")
    assert named("--run", "../x/v1", "--runs", "../x") == ("v1", "synthetic")
    assert named("--run", "autumn/") == ("autumn", "synthetic")
    assert parse(compare.Config, ["runs/a", "runs/b/"]).b == "b"
