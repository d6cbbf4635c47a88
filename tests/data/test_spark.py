"""Spark SQL on this machine writes the same data set, byte by byte."""

import shutil

import pytest

from tests.data.test_relational import check_same


@pytest.fixture(autouse=True)
def spark():
    pytest.importorskip("pyspark", reason="needs the extra [spark]")
    if not shutil.which("java"):
        pytest.skip("java: Spark needs Java 17")


@pytest.mark.parametrize("case", ["random", "temporal", "texts", "events", "given", "thin core"])
def test_spark_writes_the_same_bytes(tmp_path, case):
    check_same(tmp_path, "spark", case)


@pytest.mark.parametrize("case", ["temporal", "thin core"])
def test_two_threads_of_spark_write_the_same_bytes(tmp_path, case):
    """local[2]: several tasks at once, which end in any order."""
    from pyspark.sql import SparkSession

    masters = []

    def noted(builder, name, kept=SparkSession.Builder.master):
        masters.append(name)
        return kept(builder, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparkSession.Builder, "master", noted)
        check_same(tmp_path, "spark", case, processes=2)
    assert masters == ["local[2]"]
