"""Fuzz: schemathesis against the OpenAPI document of `pagellm serve`. Needs the extras [serve] and [load].

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/ppo, runs/<run>/reward
Prints  what schemathesis says; ends with 2 if one answer is a 5xx, or is not what the document promises

    make fuzz                               python -m experiments.stress.fuzz --dataset synthetic
    make fuzz ARGS="--cases 1000 --seed 7"

It makes requests that fit the document and requests that do not, and runs all of its checks on every answer but one:
that what fits the document is accepted. A document cannot say that min must not be above max.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass

from experiments.stress.load import needs, served
from pagellm.serving.sources import Sources
from pagellm.stage.command import main
from pagellm.stage.config import PageLLMError, check

__all__ = ["Config", "run"]


@dataclass(frozen=True, kw_only=True)
class Config(Sources):
    """Start the service and let schemathesis look for an answer that its document does not allow."""

    cases: int = 50  # of each operation, at most, in the phases that draw
    checks: str = "all"  # schemathesis' checks, comma-separated; not_a_server_error: 5xx alone
    cores: int = 2  # CPU cores of the service
    threads: int = 0  # CPU threads of a batch, as in serve; 0: torch's choice

    def __post_init__(self):
        super().__post_init__()
        check(self, cases=(self.cases > 0, "1 or more"), cores=(self.cores > 0, "1 or more"))


def run(config: Config) -> None:
    """Raises PageLLMError if schemathesis finds fault, or the service counts a 5xx of its own."""
    needs("schemathesis")
    with served(config) as service, tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                service.url + "openapi.json",
                "--checks",
                config.checks,
                "--exclude-checks",
                "positive_data_acceptance",
                "--max-examples",
                str(config.cases),
                "--seed",
                str(config.seed),
                "--request-timeout",
                "60",
            ],
            cwd=folder,
        )
        meters = service.meters()
    answered = {
        name: int(n) for name, n in meters.items() if name.startswith("pagellm_requests_total:")
    }
    broken = {name: n for name, n in answered.items() if name.rsplit(":", 1)[1].startswith("5")}
    print(
        f"fuzz: the service answered {sum(answered.values()):,} requests, {sum(broken.values())} of them with 5xx"
    )
    if ended.returncode or broken:
        raise PageLLMError(
            f"schemathesis ended with {ended.returncode}; 5xx: {broken or 'none'}; what it sent stands "
            f"above, and the same --seed {config.seed} sends it again"
        )


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.stress.fuzz"))
