"""The sections of the report, in their order on the page.

A section is a function (found, config) -> HTML, or raises Missing. To add one, write it in the
module of its subject and name it here.
"""

from collections.abc import Callable

from pagellm.report.examples import examples
from pagellm.report.findings import Found
from pagellm.report.learning import alarms, learning
from pagellm.report.options import Config
from pagellm.report.overview import overview
from pagellm.report.pages import energies, history_length, popularity, positions
from pagellm.report.provenance import data_card, provenance
from pagellm.report.results import results
from pagellm.report.reward_model import against_truth, reward_model
from pagellm.report.studies import studies

__all__ = ["SECTIONS"]


SECTIONS: dict[str, tuple[str, Callable[[Found, Config], str]]] = {
    "overview": ("At a glance", overview),
    "results": ("Results", results),
    "learning": ("Learning curves", learning),
    "reward": ("Reward model: accuracy and calibration", reward_model),
    "truth": ("Reward against held-out truth", against_truth),
    "positions": ("Position profile", positions),
    "popularity": ("Popularity and categories, before and after", popularity),
    "history": ("Users by history length", history_length),
    "energy": ("Energy, before and after", energies),
    "alarms": ("Alarms", alarms),
    "studies": ("Studies", studies),
    "examples": ("Example users", examples),
    "data": ("Data card", data_card),
    "provenance": ("Options, versions, minutes", provenance),
}
