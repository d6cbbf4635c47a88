"""Command lines: every field reachable, every mistake named."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagellm.config import PageLLMError, check, field_comments, help_text, main, parse


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Shared."""

    seed: int = 0            # of every draw


@dataclass(frozen=True, kw_only=True)
class Config(Parent):
    """What the stage does."""

    clip: float = 0.2        # epsilon, a ratio
    # a second line of help
    kl_coef: float = 0.05    # price of a nat
    name: str = ""           # any text; has a # in it
    fresh: bool = True       # yes or no

    def __post_init__(self):
        check(self, clip=(0 < self.clip < 1, "between 0 and 1"))


def test_values_of_every_kind():
    assert parse(Config, []) == Config()
    assert parse(Config, ["--clip", "0.3", "--name=a b", "--no-fresh", "--kl-coef", "-1", "--seed", "7"]) == Config(
        clip=0.3, name="a b", fresh=False, kl_coef=-1.0, seed=7)
    assert parse(Config, ["--fresh"]).fresh and not parse(Config, ["--fresh", "off"]).fresh


@settings(deadline=None)
@given(st.integers(), st.floats(allow_nan=False), st.text().filter(lambda t: not t.startswith("--")), st.booleans())
def test_a_config_survives_its_command_line(seed, kl_coef, name, fresh):
    argv = ["--seed", str(seed), f"--kl_coef={kl_coef!r}", "--name", name, "--fresh", str(fresh)]
    assert parse(Config, argv) == Config(seed=seed, kl_coef=kl_coef, name=name, fresh=fresh)


@pytest.mark.parametrize("argv, message", [
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
])
def test_mistakes_are_named(argv, message):
    with pytest.raises(PageLLMError) as error:
        parse(Config, argv, "pagellm.ppo")
    assert message in str(error.value)


def test_help_lists_every_field_with_default_and_meaning():
    text = help_text(Config, "pagellm.ppo")
    for piece in ("What the stage does.", "--seed int", "of every draw (default 0)",
                  "epsilon, a ratio a second line of help (default 0.2)", "--fresh bool", '(default "")'):
        assert piece in text
    assert field_comments(Config)["name"] == "any text; has a # in it"


def test_every_field_of_every_stage_is_explained():
    import importlib

    from pagellm.__main__ import VERBS
    for module in VERBS.values():
        config = importlib.import_module(module).Config
        comments = field_comments(config)
        missing = [name for name in config.__dataclass_fields__ if not comments.get(name)]
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
