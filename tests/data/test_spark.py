"""Spark SQL on this machine writes the same data set, byte by byte."""

import shutil

import pytest

from tests.data.test_relational import check_same


@pytest.mark.parametrize("case", ["random", "temporal", "texts", "events", "given", "thin core"])
def test_spark_writes_the_same_bytes(tmp_path, case):
    pytest.importorskip("pyspark", reason="needs the extra [spark]")
    if not shutil.which("java"):
        pytest.skip("java: Spark needs Java 17")
    check_same(tmp_path, "spark", case)
