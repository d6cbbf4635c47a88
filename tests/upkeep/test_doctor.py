"""The doctor finds what is wrong, says what to do, and its exit code says whether anything is."""

import json
import shutil

import pytest
from filelock import FileLock

from pagellm.__main__ import main
from pagellm.upkeep import doctor


@pytest.fixture
def root(sft_alone, tmp_path):
    for part in ("data", "runs"):
        shutil.copytree(sft_alone / part, tmp_path / part)
    made = tmp_path / "runs" / "base" / "sft" / "config.json"
    about = json.loads(made.read_text())
    about["config"] |= {"data": str(tmp_path / "data"), "dataset": "synthetic"}
    made.write_text(json.dumps(about))
    return tmp_path


def wrong(root, **more):
    config = doctor.Config(data=str(root / "data"), runs=str(root / "runs"), **more)
    return [f for f in doctor.examine(config) if f.kind == "wrong"]


def test_all_is_well(root, monkeypatch, capsys):
    assert wrong(root) == []
    words = ["pagellm", "doctor", "--json", f"--data={root}/data", f"--runs={root}/runs"]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    said = json.loads(capsys.readouterr().out)
    about = {f["about"] for f in said["found"]}
    assert {"packages", "machine", "memory", "cuda", "data set synthetic", "run base"} <= about


def test_what_is_wrong_is_named_with_what_to_do(root, monkeypatch, capsys):
    runs, data = root / "runs", root / "data"
    (runs / "base" / "ppo").mkdir()
    (runs / "base" / "ppo" / "config.json").write_text("{}")
    (runs / "live").symlink_to("gone")
    (data / "synthetic" / "users.parquet").unlink()
    (data / "broken").mkdir()
    (data / "broken" / "source.json").write_text("{")
    found = {f.about: f for f in wrong(root, least_gb=1e9)}
    assert "users.parquet is gone" in found["data set synthetic"].found
    assert "ppo was begun and not finished" in found["run base"].found
    assert "leads to gone" in found["link live"].found
    assert "damaged" in found["data set broken"].found
    assert "GB free" in found[str(runs)].found
    assert all(f.do for f in found.values())
    monkeypatch.setattr("sys.argv", ["pagellm", "doctor", f"--data={data}", f"--runs={runs}"])
    assert main() == 1
    assert "things are wrong" in capsys.readouterr().out


def test_damage_in_a_run_is_a_finding_and_ends_nothing(root):
    model = root / "runs" / "base" / "sft" / "model.pt"
    model.write_bytes(model.read_bytes()[:100])
    (found,) = wrong(root)
    assert "sft/model.pt is not what its stage wrote" in found.found and "make it again" in found.do
    (model.parent / "config.json").write_text("{")
    (found,) = wrong(root)
    assert "sft/config.json is damaged" in found.found


def test_a_stage_that_a_process_works_on_is_not_wrong(root, capsys):
    stage = root / "runs" / "base" / "ppo"
    stage.mkdir()
    (stage / "config.json").write_text("{}")
    with FileLock(stage / "lock"):
        assert wrong(root) == []
    assert len(wrong(root)) == 1  # the lock file is left, nobody holds it
    doctor.run(doctor.Config(data=str(root / "data"), runs=str(root / "runs")))
    assert capsys.readouterr().out.endswith("\n1 thing is wrong\n")


def test_a_run_whose_data_are_gone_and_a_folder_that_cannot_be_written(root, monkeypatch):
    shutil.rmtree(root / "data")
    assert ["its data" in f.found for f in wrong(root)] == [True]
    monkeypatch.setattr(doctor, "installed", lambda name: "" if name == "tqdm" else "1")

    def refuses(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuses)
    said = " ".join(f.found + f.do for f in wrong(root))
    assert "Permission denied" in said and "pip install tqdm" in said
