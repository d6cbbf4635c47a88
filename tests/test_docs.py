"""What the documents name exists: links, anchors, files, commands, the source of a number."""

import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pagellm import ppo
from pagellm.__main__ import VERBS, verb_and_rest
from pagellm.data.shop import load

ROOT = Path(__file__).parent.parent
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = [ROOT / "docs" / "reference" / name for name in ("stages.md", "modules.md")]
NO_NUMBERS = ("index.md", "paper-map.md")
RESULTS = [p for p in sorted((ROOT / "docs" / "results").glob("*.md")) if p.name not in NO_NUMBERS]
PACKAGES = ("kernels", "pagellm", "experiments", "tests", "docs")


def name(path):
    return str(path.relative_to(ROOT))


@cache
def text(path):
    """A page without its diffs, which name what is not there yet."""
    whole = path.read_text(encoding="utf-8")
    return re.sub(r"^```diff\n.*?^```$", "", whole, flags=re.MULTILINE | re.DOTALL)


def prose(path):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text(path), flags=re.MULTILINE | re.DOTALL)


def code(path):
    """All code of a page: fenced blocks, and inline code with its line breaks taken out."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```$", text(path), re.MULTILINE | re.DOTALL)
    return [
        *blocks,
        *(" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose(path))),
    ]


def slug(heading):
    """The anchor of a heading, as the sites that show the pages make it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@cache
def anchors(path):
    return {slug(heading) for heading in re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)}


def links(path):
    return [
        link for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not re.match(r"\w+:", link)
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_and_anchor_leads_somewhere(page):
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), (
                f"{link}: headings there: {', '.join(sorted(anchors(target)))}"
            )


def test_every_page_of_the_docs_is_reached_from_its_front_page():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = (
            (page.parent / link.partition("#")[0]).resolve()
            for link in links(page)
            if link[0] != "#"
        )
        waiting += [target for target in targets if target.suffix == ".md"]
    assert not [name(page) for page in PAGES if page not in reached]


def test_the_readme_is_a_front_page():
    assert len(text(ROOT / "README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", [p for p in PAGES if p not in GENERATED], ids=name)
def test_lines_of_prose_have_at_most_100_columns(page):
    for line in prose(page).splitlines():
        assert len(line) <= 100 or line.startswith("|") or "](" in line or "http" in line, line


def tables(path):
    """(heading, words above within its section, first line) of every table."""
    found, heading, above, inside = [], "", "", False
    for line in prose(path).splitlines():
        if line.startswith("#"):
            heading, above = line, ""
        if line.startswith("|"):
            if not inside:
                found.append((heading, above, line))
            inside = True
        else:
            inside = False
            above += line + " "
    return found


@pytest.mark.parametrize("page", RESULTS, ids=name)
def test_every_table_of_results_names_its_command_commit_date_and_machine(page):
    assert "**Command**" in text(page), "a page of results without a measurement"
    assert tables(page) or "```" in text(page), "a page of results without numbers"
    for heading, above, first in tables(page):
        said = above.rpartition("**Command**")[2]
        assert re.match(r" `[^`]+`", said), f"{heading}: {first}: no command above it"
        assert re.search(r"\*\*Commit\*\*[^*]*`[0-9a-f]{7,}`[^*]*\d{4}-\d\d-\d\d", said), (
            f"{heading}: {first}: no commit"
        )
        assert "**Machine**" in said, f"{heading}: {first}: no machine"


@cache
def targets():
    """Targets with a line of help, and those that .PHONY names by their variable."""
    makefile = text(ROOT / "Makefile")
    said = re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1]
    lists = [
        re.search(rf"^{variable} := (.*)$", makefile, re.MULTILINE)[1]
        for variable in re.findall(r"\$\(([A-Z_]+)\)", said)
    ]
    helped = re.findall(r"^([a-z-]+)[ :].*  ## ", makefile, re.MULTILINE)
    return {*helped, *" ".join(lists).split()}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_make_target_that_is_named_exists(page):
    for piece in code(page):
        for target in re.findall(r"(?:^|[;&] |\n|\d )make +([a-z][a-z_-]*)(?=$|[\s;])", piece):
            assert target in targets(), f"make {target}: {piece}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_that_is_named_exists(page):
    for piece in code(page):
        for verb in re.findall(r"(?:^|[;&] |\n|bin/)pagellm +([a-z][a-z-]*)", piece):
            assert verb in VERBS, f"pagellm {verb}: {piece}"
        for words in re.findall(r"(?:^|[;&] |\n|bin/)pagellm +(storefront [a-z]+)", piece):
            assert words in VERBS, f"pagellm {words}: {piece}"
        for module in re.findall(
            r"python -m (?:pydoc )?((?:pagellm|experiments|kernels)[\w.]*)", piece
        ):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
                f"python -m {module}: {piece}"
            )


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_every_source_file_that_is_named_exists(page):
    for piece in code(page):
        for path in re.findall(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)})/[\w./-]*\w)", piece):
            if "myshop" not in path:  # a preset that the reader is told to write
                assert (ROOT / path).exists(), f"{path}: {piece}"


def test_every_option_of_a_command_that_is_named_exists():
    for page in PAGES:
        for piece in code(page):
            for words in re.findall(r"(?:^|\n|bin/)pagellm +([a-z][^\n]*)", piece):
                verb, rest = verb_and_rest(words.split())
                rest = " ".join(rest)
                config = importlib.import_module(VERBS[verb]).Config
                known = {f.name for f in dataclasses.fields(config)} | {"help", "config"}
                known |= set(getattr(config, "ALIASES", {}))
                for option in re.findall(r"(?<!\S)--(?:no-)?([a-z][a-z_]*)", rest):
                    assert option in known, f"{name(page)}: --{option}: pagellm {verb} {rest}"


def test_the_generated_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_http_reference_names_every_route():
    modules = (path for name in ("api", "frame") for path in (ROOT / "pagellm").rglob(f"{name}.py"))
    said = text(ROOT / "docs" / "reference" / "http.md")
    routes = re.findall(r'@\w+\.(get|post)\(\s*"([^"]+)"', "".join(map(text, modules)))
    assert len(routes) > 9
    for method, route in routes:
        assert f"{method.upper()} {route.replace(':path', '')}`" in said, f"{method} {route}"


def test_the_file_reference_names_every_file_and_column_that_the_stages_write(served):
    """From a small shop and its stages: every name of a file, and every column of every table."""
    import pyarrow.parquet as pq

    said = text(ROOT / "docs" / "reference" / "files.md")
    written = [
        path
        for folder in ("data", "runs")
        for path in (served / folder).rglob("*")
        if path.is_file()
    ]
    assert len(written) > 10
    for path in written:
        if path.parent.name != "raw":
            name = re.sub(r"^\w+\.scale\.npy$", "<name>.scale.npy", path.name)
            assert f"`{name}`" in said, path.relative_to(served)
        if path.suffix == ".parquet":
            # per_user.parquet has one column a metric, whose names the reference does not repeat.
            names = ["user"] if path.name == "per_user.parquet" else pq.read_schema(path).names
            for column in names:
                assert f"`{column}`" in said, f"{path.relative_to(served)}: {column}"


def test_the_page_on_ppo_names_every_file_that_one_update_runs_through(served, tmp_path):
    """Three files to open, five to look up; the rest is named as what a reader can pass over."""
    options = {"rollout": 16, "minibatch": 8, "k": 6, "critic_warmup": 0, "device": "cpu"}
    places = {"data": str(served / "data"), "runs": str(served / "runs")}
    config = ppo.Config(run="base", **options, **places)
    nets = ppo.Networks.load(config, config.stage("sft"), config.stage("reward"), "cpu")
    asked = ppo.Prompts(config, load(config.data_dir), nets.policy)(0)
    training = ppo.Training(config, nets, 5)
    ran = set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename).resolve()
        if event == "call" and path.is_relative_to(ROOT):
            ran.add(path.relative_to(ROOT).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        row = training.step(0, ppo.roll_out(config, nets, asked), asked, None)
    finally:
        sys.setprofile(before)
    assert row["stopped"] in (0.0, 1.0) and row["learning"]
    page = text(ROOT / "docs" / "explanation" / "ppo.md")
    section = page.partition("## Follow one update")[2].partition("\n## ")[0]
    opened, looked_up, passed = re.split(r"\nLook up five|\nThe update passes", section)
    found = [re.findall(r"`((?:pagellm|kernels)/\S+\.py)`", s) for s in (opened, looked_up, passed)]
    assert (len(found[0]), len(found[1])) == (3, 5)
    assert {path for path in ran if path.startswith(("pagellm/", "kernels/"))} == set(
        sum(found, [])
    )


def test_the_contributing_guide_has_a_place_for_each_diff():
    said = text(ROOT / "CONTRIBUTING.md")
    for kind in ("metric", "reward_term", "format", "stage", "study"):
        assert said.count(f"<!-- diff: {kind} -->") == 1


def test_the_readme_can_be_run_and_says_which_blocks_cannot():
    """Every fenced block is either run by docs/run_readme.py or says why not; none is forgotten."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marks = re.findall(r"^```(\S.*)$", text, flags=re.MULTILINE)
    assert set(marks) <= {"bash", "bash no-run"} and marks.count("bash") >= 2
    listed = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "run_readme.py"), "--list", "--skip", "make test"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "\nmake\n" in listed and "pagellm recommend" in listed and "make test" not in listed


def test_the_stories_can_be_typed_by_a_program():
    """Each story has lines; a Python block has a file's name, and somebody runs it."""
    spec = importlib.util.spec_from_file_location("stories", ROOT / "docs" / "run_stories.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.stories(module.STORIES.read_text(encoding="utf-8"))
    assert list(found)[0] == "Install" and len(found) == 6
    for story in found.values():
        assert module.lines(story) and not any(x.endswith("\\") for x in module.lines(story))
        if module.blocks(story, "python"):
            assert len(set(re.findall(r"\b(\w+\.py)\b", story))) == 1
    wheels = [x for story in found.values() for x in module.lines(story) if ".whl" in x]
    assert len(wheels) == 3
    assert all(re.sub(module.WHEEL, "W", x).lstrip("pi nstal'").startswith("W") for x in wheels)
