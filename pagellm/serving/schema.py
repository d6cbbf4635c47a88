"""The JSON bodies of the HTTP service, as pydantic models.

Docstrings and names of the models are part of the OpenAPI document.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pagellm.pages.variety import STRENGTH
from pagellm.serving.filters import Filters
from pagellm.serving.recommender import Ask

__all__ = [
    "Allowed",
    "Error",
    "FoundList",
    "Id",
    "Interesting",
    "Item",
    "Page",
    "PageRequest",
    "ScoreRequest",
    "ShopFacts",
    "Status",
    "Strict",
    "User",
]


# Requests. They are strict: "20" is no number, true is no 1, and an unknown field is an error.

Id = Annotated[str, Field(min_length=1, max_length=256)]
IdList = Annotated[list[Id], Field(max_length=100_000)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Event(Strict):
    """An item of a history."""

    item: Id
    rating: Annotated[float, Field(ge=1, le=5, allow_inf_nan=False)] | None = Field(
        None,
        description="1 to 5; null: level unknown. Items rated low are kept off the page, "
        "not shown to the model",
    )


class PriceRange(Strict):
    """Bounds in the shop's currency, both included. An item of unknown price fails."""

    min: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def ordered(self):
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        return self


class Allowed(Strict):
    """Constraints on every slot. Leave a field out for no filter; an empty list allows nothing."""

    exclude: IdList = Field(default_factory=list, description="item ids that no slot may hold")
    categories: Annotated[list[Id], Field(max_length=1000)] | None = Field(
        None, description="an item needs at least one of these"
    )
    in_stock: IdList | None = Field(None, description="only these item ids")
    price: PriceRange | None = None


class PageFilters(Allowed):
    seen: Literal["hide", "allow"] | None = Field(
        None,
        description="items that the person has met: hide, no slot holds them; allow, a slot may "
        "hold them again, unless the person disliked them; null: what the service was started with "
        "(--seen)",
    )


class Person(Strict):
    """Who the page is for: a user, a history, or both (the history then follows what is stored)."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["user"], "properties": {"user": {"type": "string"}}},
                {"required": ["history"], "properties": {"history": {"type": "array"}}},
            ]
        }
    )

    user: Id | None = Field(
        None, description="the shop's id; a stranger is served from the history alone"
    )
    history: Annotated[list[Event], Field(max_length=1000)] | None = Field(
        None,
        description="oldest first; an empty list without a user asks for the page of a total "
        "stranger",
    )
    policy: Literal["compose", "ppo", "sft", "plain"] | None = Field(
        None,
        description="compose: composed pages; ppo: with the reward; sft: without it; plain: ALS "
        "with facts and MMR, to compare with; null: the `default` of GET /v1/shop. One that is not "
        "served is an error",
    )
    explain: bool = Field(False, description="add to each slot the nearest items of the history")

    @model_validator(mode="after")
    def somebody(self):
        if self.user is None and self.history is None:
            raise ValueError("give user, history, or both")
        return self

    def asked(self, **more) -> Ask:
        history = tuple(
            (e.item, float("nan") if e.rating is None else e.rating) for e in self.history or ()
        )
        return Ask(
            user=self.user, history=history, policy=self.policy or "", explain=self.explain, **more
        )


class Varied(Strict):
    """Variety inside decoding, of ppo and sft. Composed pages have their own."""

    method: Literal["mmr", "energy"]
    strength: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        STRENGTH, description="in nats of log-probability"
    )


class PageRequest(Person):
    k: int = Field(20, ge=1, le=1000, description="slots; at most what GET /v1/shop says")
    decoding: Literal["greedy", "beam", "one_shot"] | None = Field(
        None,
        description="of ppo and sft; null: what validation chose, `decoding` of GET /v1/shop",
    )
    variety: Varied | None = None
    new_items: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="slots that are kept for new items, the best of them for the user; at most k; "
        "null: what the service was started with (--new_items)",
    )
    filters: PageFilters = Field(default_factory=PageFilters)  # type: ignore[arg-type]

    def ask(self) -> Ask:
        f = self.filters
        price = f.price or PriceRange()
        return self.asked(
            k=self.k,
            mode=self.decoding or "",
            new_items=self.new_items,
            variety=self.variety.method if self.variety else "none",
            strength=self.variety.strength if self.variety else STRENGTH,
            filters=Filters(
                tuple(f.exclude),
                None if f.categories is None else tuple(f.categories),
                None if f.in_stock is None else tuple(f.in_stock),
                price.min,
                price.max,
                f.seen,
            ),
        )


class ScoreRequest(Person):
    items: Annotated[list[Id], Field(max_length=1000)] = Field(
        description="the page in order, each item at most once",
        json_schema_extra={"uniqueItems": True},
    )

    @model_validator(mode="after")
    def distinct(self):
        if len(set(self.items)) < len(self.items):
            raise ValueError("items repeats an item; want each at most once")
        return self

    def ask(self) -> Ask:
        return self.asked(page=tuple(self.items))


# Answers. These models document them; recommender.Recommender builds them as plain values.


class Item(BaseModel):
    item: str
    title: str
    category: str | None
    brand: str | None
    price: float | None


class Similar(BaseModel):
    item: str
    title: str
    similarity: float = Field(description="cosine of the two item rows, -1 to 1")


class Slot(Item):
    rank: int
    score: float | None = Field(
        description="log-probability of the item in this slot, in nats; of a composed page the log "
        "of the chance that the user picks it; of plain the score of ALS; null in /v1/score"
    )
    token_reward: float | None = Field(
        description="what the slot adds, in reward-model units; null without a reward model"
    )
    held_out: bool | None = Field(
        None, description="explain: held out, so the user chose it unseen by the model"
    )
    similar: list[Similar] | None = Field(None, description="explain: nearest items of the history")


class Served(BaseModel):
    id: str | None
    known: bool
    history: int = Field(description="items of history the page was made from")


class Unknown(BaseModel):
    user: bool
    items: list[str]
    categories: list[str]


class Page(BaseModel):
    user: Served
    items: list[Slot]
    page_reward: float | None = Field(
        description="reward-model units, 0 is the mean ground-truth page; null if the page is "
        "empty or there is no reward model"
    )
    energy: float = Field(
        description="page energy E; gains from the user's held-out ratings, 0 for all other items "
        "(and for all where nothing is held out)"
    )
    ild: float | None = Field(description="intra-list diversity, 0 to 1; null below two items")
    entropy: float | None = Field(description="of categories, in nats; null if empty")
    unknown: Unknown
    notes: list[str]
    policy: str
    decoding: str | None = Field(
        description="mode of ppo or sft; null for composed pages and plain"
    )
    model: str = Field(description="hash of the policy's weights")
    reward_model: str | None = Field(description="hash of its weights; null without one")
    latency_ms: float


class Stored(Item):
    rating: float | None


class User(BaseModel):
    id: str
    history: list[Stored]


class Found(BaseModel):
    id: str
    title: str


class FoundList(BaseModel):
    found: list[Found]


class Noted(BaseModel):
    id: str
    value: float


class NotedGroup(BaseModel):
    name: str
    measure: Literal["changed", "reward", "near", "newest", "history"] = Field(
        description="what value is. changed: items that are on both pages; reward: page reward; "
        "near: mean cosine of the slots' items and their nearest item of the history; newest: "
        "first event, in seconds since 1970; history: items of it"
    )
    users: list[Noted]


class Interesting(BaseModel):
    sampled: int = Field(description="users whose pages were written to find changed, reward, near")
    groups: list[NotedGroup]


class Category(BaseModel):
    name: str
    items: int


class ShopFacts(BaseModel):
    dataset: str
    users: int
    items: int
    k_max: int
    price: PriceRange | None
    categories: list[Category]
    models: dict[str, str] = Field(
        description="compose, ppo, sft, reward: hashes of what is served; data"
    )
    policies: list[str] = Field(description="what may write a page")
    default: str = Field(description="the policy of a request that names none")
    why: str = Field(description="why it is the default, in words")
    decoding: dict[str, str] = Field(description="ppo, sft: the mode that validation chose")
    split: str = Field(description="rows held out from prompts: none, test or valid")
    version: str


class Status(BaseModel):
    status: str


class Problem(BaseModel):
    field: str
    problem: str


class ErrorBody(BaseModel):
    code: str
    message: str
    fields: list[Problem] = []


class Error(BaseModel):
    error: ErrorBody
