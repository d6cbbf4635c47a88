"""pytest's option --only-skips: a test that is skipped for any other reason counts as failed.

    pytest --only-skips cuda,shared         what .ci/run asks for

A reason begins with its tag: "cuda: no CUDA device". So a package that is missing by mistake cannot
turn tests into skips that nobody reads.
"""

import pytest

__all__ = ["pytest_addoption", "pytest_make_collect_report", "pytest_runtest_makereport"]


def pytest_addoption(parser):
    parser.addoption(
        "--only-skips",
        metavar="TAGS",
        help="fail tests that are skipped for a reason without one of these tags (comma-separated)",
    )


def judge(report, config) -> None:
    """Make the report of a skipped test or file one of a failure, if no tag allows the skip."""
    tags = config.getoption("only_skips")
    if tags is None or not report.skipped or hasattr(report, "wasxfail"):
        return
    where = report.longrepr
    reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
    if reason.split(":")[0] not in tags.split(","):
        report.outcome = "failed"
        report.longrepr = f"skipped, and only {tags} may be: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    judge(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    judge(report, collector.config)
    return report
