"""What a shop's rows must not say: built-in lists for English, and a shop's own on top.

policy = policy_of({"banned": ["scam"], "restricted": ["Cigarettes"]})

Words are matched as whole stems, never inside other words. "treat*" with a star means that the word
is allowed at the end of a title (dog treats) and nowhere else.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import lru_cache

from pagellm.stage.config import PageLLMError
from pagellm.storefront.parts import INTENTS
from pagellm.storefront.schemas import POLICY, check
from pagellm.storefront.text import SHORT, stems

__all__ = ["Policy", "Terms", "bare", "policy_of"]

BANNED = (
    "shit|bullshit|damn|fuck|fucking|bitch|bastard|asshole|arse|ass|crap|piss|porn|sexy|slut|"
    "slutty|whore|nazi|kill|dickhead|cunt|nude|bloody hell|wanker|motherfucker|suicide|rape"
)
CLAIMS = (
    "cure|cures|curing|treat*|treatment|heal|healing|heals|detox|detoxing|detoxify|weight loss|"
    "lose weight|immune|immunity|slimming|remedy|price|prices|percent|dollar|cent|euro|pound "
    "sterling|cheap|cheaper|cheapest|discount|bargain|lowest|save|buy one get|half off|under "
    "budget|guarantee|guaranteed|unbeatable|number one|no 1|best in the world|world s best|world "
    "best|deal"
)
FREE_OF = (
    "sugar",
    "gluten",
    "dairy",
    "fat",
    "lactose",
    "caffeine",
    "nut",
    "alcohol",
    "cage",
    "salt",
    "oil",
)
SENSITIVE = (
    "diabetic|diabetes|pregnant|pregnancy|depression|depressed|cancer|disabled|obese|overweight|"
    "hiv|menopause|anxious|anxiety|alzheimer|adhd|fertility|blood pressure|allergy|allergies|"
    "asthma|autism|autistic|alcoholic|dementia|arthritis|epilepsy|hangover|christian|muslim|"
    "islamic|jew|jewish|hindu|buddhist|catholic|atheist|gay|lesbian|bisexual|transgender|queer|"
    "asian people|black people|white people|black family|white family|asian family|african "
    "american|latino|immigrant|migrant|old people|elderly|senior citizen|senior|poor|low income|"
    "wealthy|conservative|liberal|democrat|republican|voter|single mother|divorced|you are|like "
    "you|because you|since you"
)
INSTRUCTIONS = (
    "ignore|disregard|forget your|override|previous instruction|prior rule|language model|as an ai|"
    "system prompt|the prompt|you are a|inst"
)
MACHINE = re.compile(
    r"[{}\u202a-\u202e\u2066-\u2069]|<[a-z/!?|]|\|>|^\s*(system|assistant|user)\s*:", re.I
)
# What stands in regular expressions and not in plain text. Signs by themselves are plain:
# Beer & wine (0.5 l), 3+, US$, C++, Milk | cream, Eggs [6-pack], What?
PATTERN = re.compile(
    r"\\"  # \b, \d+, \.
    r"|\.[*+]"  # .* and .+
    r"|^[\^*]|(?:[a-z]{3}|[)\]])\$$"  # ^scam, *scam, scam$
    r"|\(\?[:=!<Pimsx]"  # (?i)
    r"|[\w)]\|[\w(]"  # scam|fraud
    r"|\w\?\w"  # colou?r
    r"|\)[+?{]|\)\*.|\w[*+]\?"  # (very)+, a+?
    r"|(?:\w|^)\[[^\]\s]+\][\w*+?{]"  # sc[a4]m, [Ss]cam, [ab]+
    r"|\[\^?(?:a-z|A-Z|0-9)"  # [a-z
    r"|\{\d*,?\d*\}"  # {2,}
)
TERMS = ("banned", "claims", "sensitive", "instructions", "restricted")  # lists of plain words
RESTRICTED = (
    "tobacco|cigarette|cigar|alcohol|beer|ale|wine|liquor|spirit|family planning|condom|medicine|"
    "analgesic|antacid|laxative|cold and flu|sinus and allergy|diaper|infant formula|feminine "
    "hygiene|dietary aid|fitness and diet|first aid|vitamin|incontinence|beerale"
)


class Terms:
    """Phrases, matched against texts stem by stem."""

    def __init__(self, phrases):
        self.remembered = lru_cache(1 << 14)(self.look)
        self.by_first: dict[str, list[tuple[str, ...]]] = {}
        self.not_last: set[tuple[str, ...]] = set()
        for phrase in phrases:
            key = tuple(stems(phrase))
            if not key:
                raise PageLLMError(f"the policy's term {phrase!r} holds no word; take it out")
            self.by_first.setdefault(key[0], []).append(key)
            if phrase.endswith("*"):
                self.not_last.add(key)

    def found(self, text: str) -> str:
        """The first phrase that a text holds, in stems; "" for none.

        Short texts are remembered: titles and keywords come again, page by page.
        """
        return self.remembered(text) if len(text) <= SHORT else self.look(text)

    def look(self, text: str) -> str:
        have = stems(text)
        if self.by_first.keys().isdisjoint(have):
            return ""
        for at, first in enumerate(have):
            for key in self.by_first.get(first, ()):
                if tuple(have[at : at + len(key)]) == key:
                    if key in self.not_last and at + len(key) == len(have):
                        continue
                    return " ".join(key)
        return ""


@dataclass(frozen=True)
class Policy:
    """The rules of a shop. name is part of every cache key."""

    name: str
    banned: Terms
    claims: Terms
    sensitive: Terms
    instructions: Terms
    restricted: Terms  # categories that no generated row may name or hold
    calendar: tuple[dict, ...] = ()
    sponsored_share: float = 0.2
    caps: dict[str, int] = field(default_factory=dict)  # category -> items a page
    min_items: int = 4
    titles: dict[str, tuple[str, ...]] = field(default_factory=dict)  # intent -> forms

    def forbidden(self, text: str) -> bool:
        """Whether a text may not even be a keyword: rude words, instructions, markup."""
        if re.search(r"[{}<>\[\]|\\]", text):
            return True
        return bool(self.banned.found(text) or self.instructions.found(text))

    def planted(self, text: str) -> bool:
        """Whether a title was written for a machine: an instruction, markup, marks that turn text
        around.
        """
        return bool(MACHINE.search(text)) or bool(self.instructions.found(text))

    def against(self, text: str) -> str:
        """The first term of any list that a text holds, in stems; "" for none."""
        lists = (self.restricted, self.banned, self.claims, self.sensitive, self.instructions)
        return next((term for terms in lists if (term := terms.found(text))), "")

    @property
    def texts(self) -> list[str]:
        """What a person wrote to stand in titles: names of seasons, and forms of titles."""
        forms = [bare(form) for forms in self.titles.values() for form in forms]
        return [*(entry["name"] for entry in self.calendar), *forms]

    def seasons(self, at: int) -> list[dict]:
        """The calendar's entries in force at a moment (seconds)."""
        today = datetime.fromtimestamp(at, UTC).date().isoformat()
        return [entry for entry in self.calendar if entry["from"] <= today <= entry["to"]]


def policy_of(document: dict | None = None, name: str = "built-in") -> Policy:
    """A shop's policy on top of the built-in one.

    Raises PageLLMError naming the field that is wrong.
    """
    document = {} if document is None else document
    if problems := check(document, POLICY) or not_plain(document):
        raise PageLLMError("the policy is not valid\n  " + "\n  ".join(problems))
    for entry in document.get("calendar", ()):
        try:
            first, last = (date.fromisoformat(entry[end]) for end in ("from", "to"))
        except ValueError:
            raise PageLLMError(
                f"the policy's season {entry['name']!r}: want dates like 2017-12-01"
            ) from None
        if first > last:
            raise PageLLMError(f"the policy's season {entry['name']!r} ends before it begins")
    for intent, forms in document.get("titles", {}).items():
        check_forms(intent, forms)
    for category, most in document.get("caps", {}).items():
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise PageLLMError(f"the policy's cap of {category!r}: want a whole number, 0 or more")

    def terms(field_name: str, built_in: str) -> Terms:
        return Terms([*built_in.split("|"), *document.get(field_name, ())])

    policy = Policy(
        name,
        terms("banned", BANNED),
        terms("claims", CLAIMS),
        terms("sensitive", SENSITIVE),
        terms("instructions", INSTRUCTIONS),
        terms("restricted", RESTRICTED),
        tuple(document.get("calendar", ())),
        document.get("sponsored_share", 0.2),
        dict(document.get("caps", {})),
        document.get("min_items", 4),
        {intent: tuple(forms) for intent, forms in document.get("titles", {}).items()},
    )
    for intent, forms in policy.titles.items():
        for form in forms:
            if why := policy.against(bare(form)):
                raise PageLLMError(
                    f"the policy blocks its own form {form!r} of {intent!r} by {why!r}"
                )
    return policy


def not_plain(document: dict) -> list[str]:
    """What is wrong with the lists of a policy that follows its schema: path, problem, what to do.

    A regular expression would be read as the words in it, and keep out something else.
    """
    found = [
        f"{name}: the list is empty, and takes nothing away from what is built in; leave {name} out"
        for name in (*TERMS, "calendar")
        if document.get(name) == []
    ]
    for name in TERMS:
        for at, term in enumerate(document.get(name, ())):
            if part := PATTERN.search(term):
                found.append(
                    f"{name}[{at}]: {term!r} is a regular expression, by its {part.group()!r}; "
                    "write plain words, one term for each; plurals are found too"
                )
    return found


def bare(form: str) -> str:
    """A form of titles without its places for names."""
    return re.sub(r"\{\w+\}", " ", form)


def check_forms(intent: str, forms) -> None:
    """Raise PageLLMError for forms of titles that no row could be named by."""
    if intent not in INTENTS:
        raise PageLLMError(f"the policy's titles of {intent!r}: want one of {', '.join(INTENTS)}")
    if not isinstance(forms, list) or not forms or not all(isinstance(f, str) for f in forms):
        raise PageLLMError(f"the policy's titles of {intent!r}: want a list of one text or more")
    for form in forms:
        rest = re.sub(r"\{(A|a|b|Season|season)\}", "", form)
        if "{" in rest or "}" in rest or len(form) > 80:
            raise PageLLMError(
                f"the policy's form {form!r} of {intent!r}: want at most 80 characters, and in "
                "braces {A}, {a}, {b}, {Season} or {season} alone"
            )
