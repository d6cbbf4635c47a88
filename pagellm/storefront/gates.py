"""Gates: what keeps a bad title, theme, keyword, row or page from being shown.

decisions = check_text("Easy weekday breakfasts", "", policy, known)
blocked(decisions)                                          False

Order: rules first, then the scorer's agreement on every row. A decision names no person.
"""

import json
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagellm.online.abtest import beta_cdf
from pagellm.pages import metrics
from pagellm.stage.files import write_json
from pagellm.storefront.corpus import STOP, Corpus, set_overlap
from pagellm.storefront.parts import Context, Decision, Keyword, Placement, Row, Theme
from pagellm.storefront.policy import FREE_OF, Policy
from pagellm.storefront.text import stem, stems, words

__all__ = [
    "KillSwitch",
    "LEAST_FITTING",
    "LONGEST",
    "LOOKED_AT",
    "MOST_WORDS",
    "Threshold",
    "blocked",
    "check_keywords",
    "check_page",
    "check_placement",
    "check_text",
    "check_theme",
    "choose_threshold",
    "clopper_pearson",
    "kappa",
    "known_words",
    "likeness",
]

SHORTEST, LONGEST, LONGEST_SUBTITLE, MOST_WORDS = 3, 40, 80, 7
MOST_CAPITALS, LEAST_KNOWN, MOST_ECHO = 0.6, 0.5, 0.6
MOST_ALIKE, MOST_OVERLAP = 0.85, 0.6
LEAST_MATCHES, LOOKED_AT, LEAST_FITTING = 4, 5, 0.8
FITS = 0.5  # agreement from which an item counts as fitting
LEAST_ENTROPY = 0.5
# Words that titles may hold although no text of the catalogue has them.
TITLE_WORDS = frozenset(
    map(
        stem,
        "easy quick simple fresh daily weekday weekend week weeknight morning noon evening night "
        "today breakfast lunch dinner supper brunch meal picnic party season summer winter spring "
        "autumn fall holiday game movie day home house kitchen family favourite favorite classic "
        "cosy warm cold hot new more discover try explore buy again stock restock refill basic "
        "essential pick idea time table bowl plate board box bar basket drawer corner counter "
        "cupboard pantry fridge shelf filler helper maker topper starter warmer side snack treat "
        "taste sunday friday taco road trip beach camping school office garden birthday roast "
        "grill barbecue bake baking cook cooking around world make made ready great good little "
        "big light sweet savoury savory spicy crunchy creamy one two three next go".split(),
    )
)


def passed(
    level: str, rule: str, value: float, threshold: float, ok: bool, action="drop"
) -> Decision:
    return Decision("gates", level, rule, "pass" if ok else action, float(value), float(threshold))


def blocked(decisions: Sequence[Decision]) -> bool:
    """Whether any of the decisions blocks."""
    return any(decision.action != "pass" for decision in decisions)


def known_words(texts: Sequence[str]) -> frozenset[str]:
    """The stems of some texts, of stop words and of what titles are usually made of."""
    return frozenset(s for text in texts for s in stems(text)) | TITLE_WORDS | set(map(stem, STOP))


def allowed_characters(text: str) -> bool:
    """Letters and digits of any script, space and & ' , -."""
    return all(char.isalnum() or char in " &',-" for char in text)


def capitals(text: str) -> float:
    """The share of letters that are capitals; 0 for texts of less than four letters."""
    letters = [char for char in text if char.isalpha()]
    return sum(char.isupper() for char in letters) / len(letters) if len(letters) > 3 else 0.0


def echo(title: str, prompt: str) -> float:
    """The longest run of the title's words that stands in the prompt, over all its words; runs of 3
    and more.
    """
    have, said = words(title), words(prompt)
    best = 0
    for start in range(len(said)):
        for at in range(len(have)):
            n = 0
            while at + n < len(have) and start + n < len(said) and have[at + n] == said[start + n]:
                n += 1
            best = max(best, n)
    return best / len(have) if best >= 3 else 0.0


def says_free(text: str) -> bool:
    """ "free" that is not "sugar free" or the like."""
    have = stems(text)
    return any(
        s == "free" and (at == 0 or have[at - 1] not in FREE_OF) for at, s in enumerate(have)
    )


def check_form(title: str, subtitle: str) -> list[Decision]:
    """Length, characters, capitals, repeated words."""
    n, have = len(title), words(title)
    content = [word for word in map(stem, have) if word not in STOP]
    repeats = len(content) - len(set(content))
    return [
        passed("text", "length", n, LONGEST, SHORTEST <= n <= LONGEST),
        passed(
            "text", "subtitle", len(subtitle), LONGEST_SUBTITLE, len(subtitle) <= LONGEST_SUBTITLE
        ),
        passed("text", "words", len(have), MOST_WORDS, 1 <= len(have) <= MOST_WORDS),
        passed(
            "text", "characters", 0, 0, allowed_characters(title) and allowed_characters(subtitle)
        ),
        passed(
            "text", "capitals", capitals(title), MOST_CAPITALS, capitals(title) <= MOST_CAPITALS
        ),
        passed("text", "repeats", repeats, 0, repeats == 0),
    ]


def check_text(
    title: str, subtitle: str, policy: Policy, known: frozenset[str], prompt: str = ""
) -> list[Decision]:
    """One decision a rule, in order. All of them are hard.

    known   stems of the catalogue's words: see known_words
    prompt  what a model was asked, so that a title that repeats it is seen
    """
    both = f"{title} {subtitle}" if subtitle else title
    found = check_form(title, subtitle)
    # Single letters are what an apostrophe leaves: Dick's.
    have = [word for word in stems(title) if len(word) > 1 and not word.isdigit()]
    share = sum(word in known for word in have) / len(have) if have else 1.0
    found.append(passed("text", "known", share, LEAST_KNOWN, share >= LEAST_KNOWN))
    for rule in ("banned", "claims", "sensitive", "instructions"):
        found.append(passed("text", rule, 0, 0, not getattr(policy, rule).found(both)))
    links = re.search(r"://|www\b|@|\w\.\w", both) is not None
    found.append(passed("text", "free", 0, 0, not says_free(both)))
    found.append(passed("text", "url", 0, 0, not links))
    said = echo(title, prompt) if prompt else 0.0
    found.append(passed("text", "echo", said, MOST_ECHO, said <= MOST_ECHO))
    return found


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def likeness(a: Theme, b: Theme, corpus: Corpus | None = None) -> float:
    """How alike two themes are, 0..1:

    the largest of title-stem Jaccard, concept Jaccard and cosine.
    """
    found = [
        jaccard(frozenset(stems(a.title)), frozenset(stems(b.title))),
        jaccard(frozenset(a.concepts), frozenset(b.concepts)),
    ]
    if corpus is not None:
        found.append(float(corpus.theme_vector(a) @ corpus.theme_vector(b)))
    return max(found)


def check_theme(
    theme: Theme, above: Sequence[Theme], corpus: Corpus | None, policy: Policy
) -> list[Decision]:
    """A theme beside those above it on the page.

    `editorial` themes may name restricted categories.
    """
    names = (theme.title, theme.subtitle, *theme.concepts)
    clean = theme.intent == "editorial" or not any(policy.restricted.found(name) for name in names)
    nearest = max((likeness(theme, other, corpus) for other in above), default=0.0)
    return [
        passed("theme", "restricted", 0, 0, clean, "replace"),
        passed("theme", "alike", nearest, MOST_ALIKE, nearest <= MOST_ALIKE, "replace"),
    ]


def check_keywords(
    keywords: Sequence[Keyword],
    corpus: Corpus,
    context: Context,
    min_items: int,
    policy: Policy,
    generated: bool = True,
) -> tuple[list[Keyword], list[Decision]]:
    """The keywords that stay, and a decision for each that was looked at.

    generated  by a writer: no keyword names a restricted category. A merchandiser's may.

    A keyword must be in the corpus, match 4 items that this person may see (fewer where all
    keywords together match min_items), and overlap no earlier one by more than .6.
    """
    items = {k.text: own_matches(k, corpus, context) for k in keywords if k.text in corpus.number}
    few = any(len(found) < LEAST_MATCHES for found in items.values())
    together = len(np.unique(np.concatenate(list(items.values())))) if few else 0

    def shared(one: str, other: str) -> float:
        if len(context.barred):
            return set_overlap(items[one], items[other])
        return corpus.overlap(corpus.number[one], corpus.number[other])

    stay: list[Keyword] = []
    decisions = []
    for keyword in keywords:
        if keyword.text not in items or policy.forbidden(keyword.text):
            decisions.append(passed("keyword", "corpus", 0, 1, False))
            continue
        if generated and policy.restricted.found(keyword.text):
            decisions.append(passed("keyword", "restricted", 0, 0, False))
            continue
        n = len(items[keyword.text])
        enough = n >= LEAST_MATCHES or (n > 0 and together >= min_items)
        if not enough:
            decisions.append(passed("keyword", "matches", n, LEAST_MATCHES, False))
            continue
        overlap = max((shared(keyword.text, k.text) for k in stay), default=0.0)
        decisions.append(
            passed("keyword", "overlap", overlap, MOST_OVERLAP, overlap <= MOST_OVERLAP)
        )
        if overlap <= MOST_OVERLAP:
            stay.append(keyword)
    return stay, decisions


def own_matches(keyword: Keyword, corpus: Corpus, context: Context) -> np.ndarray:
    found = corpus.matches(corpus.number[keyword.text])
    return found[~np.isin(found, context.barred)] if len(context.barred) else found


def check_placement(agree: np.ndarray, placement: Placement, threshold: float) -> list[Decision]:
    """A row's items in order, by how well each fits its theme: agree (K',) 0..1."""
    first, n, least = agree[:LOOKED_AT], len(agree), placement.min_items
    mean = float(first.mean()) if len(first) else 0.0
    fitting = float((first >= FITS).mean()) if len(first) else 0.0
    return [
        passed("placement", "items", n, least, n >= least, "fall_back"),
        passed("placement", "agreement", mean, threshold, mean >= threshold, "replace"),
        passed("placement", "tp5", fitting, LEAST_FITTING, fitting >= LEAST_FITTING, "replace"),
    ]  # fmt: skip


def check_page(rows: Sequence[Row], categories: Sequence[Sequence[str]]) -> list[Decision]:
    """A whole page: no item twice, no title twice, not all of one kind."""
    items = [i for row in rows for i in row.item.tolist()]
    titles = [row.theme.title for row in rows]
    repeats = len(items) - len(set(items))
    names = {name for i in items for name in categories[i]}
    most = min(len(items), len(names))
    least = LEAST_ENTROPY * np.log(most) if most > 1 else 0.0
    spread = metrics.entropy(items, categories) or 0.0
    return [
        passed("page", "repeats", repeats, 0, repeats == 0),
        passed(
            "page",
            "titles",
            len(set(titles)),
            len(titles),
            len(set(titles)) == len(titles),
            "replace",
        ),
        passed("page", "entropy", spread, least, spread >= least - 1e-9, "replace"),
    ]


def clopper_pearson(k: int, n: int, level: float = 0.95, side: str = "lower") -> float:
    """One-sided exact bound of a share of which k of n were seen.

    Raises ValueError unless 0 <= k <= n and n > 0, or on another side than lower and upper.
    Source: Clopper and Pearson, Biometrika 1934.
    """
    if not (0 <= k <= n and n > 0) or side not in ("lower", "upper"):
        raise ValueError(f"clopper_pearson: k={k}, n={n}, side={side!r}: want 0 <= k <= n, n > 0")
    if side == "upper":
        return 1.0 - clopper_pearson(n - k, n, level, "lower")
    if k == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):  # halving: 2^-60 is below any float's step near the bound
        middle = (low + high) / 2
        # P(X >= k | middle) is the beta distribution's share below middle.
        if beta_cdf(middle, k, n - k + 1) < 1 - level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(frozen=True)
class Threshold:
    """A cut on a score: value, the lower bound of P(fits | score >= value), shares passed and
    wrongly blocked.
    """

    value: float
    bound: float
    coverage: float
    blocked: float


def choose_threshold(
    score: np.ndarray, fits: np.ndarray, precision: float = 0.95
) -> Threshold | None:
    """The lowest score from which items fit with at least this precision, surely (95%, one-sided).

    score (n,) float64, fits (n,) bool of labels that the scorer never saw; None where no cut is
    sure enough
    """
    score, fits = np.asarray(score, np.float64), np.asarray(fits, bool)
    for value in np.unique(score):
        kept = score >= value
        bound = clopper_pearson(int(fits[kept].sum()), int(kept.sum()))
        if bound >= precision:
            lost = float((fits & ~kept).sum() / fits.sum())
            return Threshold(float(value), bound, float(kept.mean()), lost)
    return None


def kappa(table: np.ndarray) -> float:
    """Cohen's kappa of two raters' counts (C, C)."""
    share = np.asarray(table, np.float64) / np.sum(table)
    chance = float(share.sum(0) @ share.sum(1))
    return float((np.trace(share) - chance) / (1 - chance))


class KillSwitch:
    """Turns generated rows off when too much is blocked or too little fits, until a person turns
    them on.

    folder     of the run; a file `off` in it turns off at once, off.json says why the switch did
    usual      share of themes that was blocked at calibration
    """

    WINDOW, MOST, JUDGED, LEAST = 500, 0.30, 200, 0.85
    EVERY = 2.0  # seconds between looks at the folder

    def __init__(self, folder: Path, usual: float, clock=time.monotonic):
        self.folder, self.usual, self.clock = Path(folder), usual, clock
        self.recent: deque[bool] = deque(maxlen=self.WINDOW)
        self.looked, self.state = -np.inf, False

    def is_off(self) -> bool:
        """Whether rows are static now. Looks at the folder every two seconds."""
        now = self.clock()
        if now - self.looked >= self.EVERY:
            self.looked = now
            self.state = (self.folder / "off").exists() or (self.folder / "off.json").exists()
        return self.state

    def note(self, was_blocked: bool) -> None:
        """One theme's decision. Turns off when the last 500 were blocked too often."""
        self.recent.append(was_blocked)
        limit = max(self.MOST, 2 * self.usual)
        if len(self.recent) == self.WINDOW and np.mean(self.recent) > limit:
            share = f"{np.mean(self.recent):.3f}"
            self.turn_off(f"{share} of the last {self.WINDOW} themes were blocked", limit)

    def judge(self, fitting: int, rows: int) -> None:
        """A day's judged rows. Turns off when surely fewer than 85% of them fit."""
        if rows >= self.JUDGED and clopper_pearson(fitting, rows, side="upper") < self.LEAST:
            self.turn_off(f"{fitting} of {rows} judged rows fit their themes", self.LEAST)

    def turn_off(self, why: str, limit: float) -> None:
        self.state = True
        if not (self.folder / "off.json").exists():
            record = {"why": why, "limit": limit, "how to turn on": "remove this file"}
            write_json(self.folder / "off.json", json.loads(json.dumps(record)))
