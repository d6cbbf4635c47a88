"""Fuzz `pagellm serve` with schemathesis, from its OpenAPI document. Extras [serve] and [load].

Reads   data/<dataset>, runs/<run>/sft, runs/<run>/ppo, runs/<run>/reward
Prints  schemathesis' report; exit code 2 if an answer is a 5xx or violates the document

    make fuzz                           python -m experiments.stress.fuzz --dataset synthetic
    make fuzz ARGS="--cases 1000 --seed 7"
    make fuzz ARGS="--rows"                 pages of rows: pagellm storefront build must have run

schemathesis sends requests that fit the document and requests that do not, and runs its checks on
every answer. One check is left out: that a request which fits the document is accepted. The
document cannot express that min must not exceed max.
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
    """Start the service and let schemathesis look for answers that its document does not allow."""

    rows: bool = False  # pages of rows: pagellm storefront serve
    cases: int = 50  # most requests for each operation, in the phases that generate requests
    checks: str = "all"  # schemathesis' checks, comma-separated; not_a_server_error: only 5xx
    cores: int = 2  # CPU cores of the service
    threads: int = 0  # CPU threads of a batch, as in serve; 0: torch's choice

    def __post_init__(self):
        super().__post_init__()
        check(self, cases=(self.cases > 0, "1 or more"), cores=(self.cores > 0, "1 or more"))


def run(config: Config) -> None:
    """Raises PageLLMError if schemathesis finds a fault or the service counts a 5xx."""
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
        f"fuzz: the service answered {sum(answered.values()):,} requests, {sum(broken.values())} "
        "of them with 5xx"
    )
    if ended.returncode or broken:
        raise PageLLMError(
            f"schemathesis ended with {ended.returncode}; 5xx: {broken or 'none'}; what it sent "
            f"stands above, and the same --seed {config.seed} sends it again"
        )


if __name__ == "__main__":
    sys.exit(main(Config, run, "experiments.stress.fuzz"))
