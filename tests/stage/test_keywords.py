"""What a command says of its options is said of keyword arguments to a caller from Python."""

import pytest

from pagellm.stage.keywords import in_python

KINDS = {"k_core": "int", "repeat": "bool", "split": "str", "columns": "str", "alpha": float}
KINDS |= {"run": str, "preset": "str", "carry": bool}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--k_core 'five': want a whole number", "k_core='five': want a whole number"),
        ("no option --k_cor; did you mean --k_core?", "no option k_cor; did you mean k_core?"),
        ("Leave --repeat out, or --no-carry.", "Leave repeat=True out, or carry=False."),
        (
            "--time_column (left: x), or --split random.",
            "time_column (left: x), or split='random'.",
        ),
        ("Lower --k_core or --alpha 0.", "Lower k_core or alpha=0."),
        ("--columns user,item,time.", "columns='user,item,time'."),
        ("say where with --raw; see --item_files", "say where with table; see items"),
        ("Keep both with --run another, or", "Keep both with run='another', or"),
        ("Keep both with RUN=another, or", "Keep both with run='another', or"),
        ("add --preset none.", "add preset='none'."),
        ("pagellm sft --dataset toys --run b", "pagellm.fit('toys', stages='sft', run='b')"),
        ("make sft DATASET=toys RUN=b", "pagellm.fit('toys', stages='sft', run='b')"),
        (
            "pagellm prepare --dataset x [--raw directory of the raw files]",
            "pagellm.prepare(table, dataset='x')",
        ),
        ("make evaluate DATASET=toys", "pagellm evaluate --dataset toys"),
        # What has no call in Python is a command still, and a sentence is a sentence.
        ("pagellm evaluate --run x, then pagellm promote x", None),
        ("`pagellm runs` lists them; remove it to make it anew", None),
        ("a -- b, x--y, two-word", None),
    ],
)
def test_options_and_commands_become_arguments_and_calls(typed, said):
    assert in_python(typed, KINDS) == (typed if said is None else said)
