"""Options of the report."""

from dataclasses import dataclass

from pagellm.stage.config import check
from pagellm.stage.run import StageConfig

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Write runs/<run>/report.html from whatever the run has left on disk."""

    dataset: str = ""  # name of the data set; empty: the one the run's stages name
    out: str = ""  # file to write; empty: <runs>/<run>/report.html
    examples: int = 20  # number of users whose pages are shown
    judged: int = 1000  # largest number of users whose pages the reward model scores
    pairs: int = 1000  # largest number of held-out pairs of each kind that measure calibration

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            examples=(self.examples >= 0, "0 or more"),
            judged=(self.judged > 1, "2 or more"),
            pairs=(self.pairs > 0, "1 or more"),
        )
