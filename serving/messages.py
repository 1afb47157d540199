"""Bodies of the HTTP interface. Types, ranges and meanings come from marketplace.schema; nothing is coerced.

Strict: no strings for numbers, no booleans for ids, no NaN or Infinity, no unknown fields, no id twice in a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from marketplace.schema import ADS, IMPRESSIONS, ORGANIC, REQUESTS, Column
from serving.settings import PriceMode

MOST_IDS = 200_000
"""Hard limit of ids in one list; settings may lower it."""
MOST_EVENTS = 10_000
"""Hard limit of events in one call; settings may lower it."""
EARLIEST, LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""Accepted times; outside lies a unit mistake (milliseconds for seconds)."""


def _of(column: Column) -> Any:
    """The pydantic type of a schema column: its storage type, bounds and meaning."""
    kinds = {pa.int64(): int, pa.int32(): int, pa.float64(): float, pa.float32(): float, pa.string(): str}
    bounds: dict[str, Any] = {"description": column.meaning}
    kind = kinds[column.dtype]
    if kind is not str:
        number = int if kind is int else float
        if column.minimum is not None:
            bounds["gt" if column.exclusive_minimum else "ge"] = number(column.minimum)
        if column.maximum is not None:
            bounds["le"] = number(column.maximum)
    if kind is float:
        bounds["allow_inf_nan"] = False
    return Annotated[kind, Field(**bounds)]


Identity = _of(REQUESTS["request_id"])
UserId = _of(REQUESTS["user_id"])
SessionId = _of(REQUESTS["session_id"])
CityId = _of(REQUESTS["city_id"])
Latitude = _of(REQUESTS["latitude"])
Longitude = _of(REQUESTS["longitude"])
UtcOffset = _of(REQUESTS["utc_offset_minutes"])
Slots = _of(REQUESTS["slots"])
AdId = _of(ADS["ad_id"])
Bid = _of(ADS["bid"])
Slot = _of(IMPRESSIONS["slot"])
CreativeId = _of(IMPRESSIONS["creative_id"])
Payment = _of(IMPRESSIONS["payment"])
Probability = _of(IMPRESSIONS["pctr"])
OrderValue = _of(IMPRESSIONS["order_value"])
PoiId = _of(ORGANIC["poi_id"])
CategoryId = _of(ORGANIC["category_id"])
Rank = _of(ORGANIC["rank"])
MOST_ORGANIC = int(ORGANIC["rank"].maximum or 0)

Moment = AwareDatetime | Annotated[float, Field(allow_inf_nan=False, description="seconds since 1970 UTC")]

_STRICT = ConfigDict(strict=True, extra="forbid")


def _time(moment: datetime | float | None) -> datetime | None:
    """UTC time of an ISO 8601 time with zone, or of seconds since 1970."""
    if moment is None:
        return None
    try:
        when = datetime.fromtimestamp(moment, UTC) if isinstance(moment, int | float) else moment.astimezone(UTC)
    except (OverflowError, OSError, ValueError):
        when = None
    if when is None or not EARLIEST <= when < LATEST:
        raise ValueError("timestamp must lie in 1970 to 2099: ISO 8601 with a time zone, or seconds (not milliseconds) since 1970")
    return when


def _once(ids: Sequence[int], what: str) -> None:
    seen: set[int] = set()
    for one in ids:
        if one in seen:
            raise ValueError(f"{what} {one} is named twice; name each once")
        seen.add(one)


class BidOverride(BaseModel):
    """A bid for this request only, instead of the platform's."""

    model_config = _STRICT
    ad_id: AdId
    bid: Bid


class OrganicItem(BaseModel):
    """An organic result of the page that asks for ads."""

    model_config = _STRICT
    poi_id: PoiId
    category_id: CategoryId
    latitude: Latitude
    longitude: Longitude


class RankRequest(BaseModel):
    """A page view that asks for ads."""

    model_config = _STRICT
    user_id: UserId
    city_id: CityId
    latitude: Latitude
    longitude: Longitude
    timestamp: Moment | None = Field(None, description="When the page was asked for: ISO 8601 with zone or seconds since 1970; default now.")
    utc_offset_minutes: UtcOffset = 0
    session_id: SessionId = 0
    request_id: Identity | None = Field(None, description="Idempotency key: a repeated id returns the stored page; default a fresh one below 2^53.")
    slots: Slots | None = Field(None, description="K, ads wanted; default from the settings. Fewer come if fewer are eligible or the model makes shorter pages.")
    bids: Annotated[list[BidOverride], Field(fail_fast=True, max_length=MOST_IDS)] = Field(default=[], description="Bids that replace the platform's for this request.")
    exclude: Annotated[list[AdId], Field(fail_fast=True, max_length=MOST_IDS)] = Field(default=[], description="Ads that must not be shown.")
    candidates: Annotated[list[AdId], Field(fail_fast=True, min_length=1, max_length=MOST_IDS)] | None = Field(None, description="Only these ads may be shown; default all of the city.")
    price_mode: PriceMode | None = Field(None, description="Price rule of the model arm for this request; default from the settings.")
    organic: Annotated[list[OrganicItem], Field(fail_fast=True, max_length=MOST_ORGANIC)] = Field(default=[], description="Organic results of the page in the order that must be kept; the answer says where ads stand among them.")
    alpha: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = Field(None, description="Exponent of bids in the page search, within the limits of the settings; default the model's. Read by EGA (V2) alone.")
    beta: Annotated[float, Field(allow_inf_nan=False, gt=0)] | None = Field(None, description="Weight of what bids nothing in the page search, within the limits of the settings; default the model's. Read by EGA (V2) alone.")

    @field_validator("timestamp")
    @classmethod
    def _timestamp(cls, moment: datetime | float | None) -> datetime | None:
        return _time(moment)

    @field_validator("bids")
    @classmethod
    def _bids_once(cls, bids: list[BidOverride]) -> list[BidOverride]:
        _once([bid.ad_id for bid in bids], "ad_id")
        return bids

    @field_validator("organic")
    @classmethod
    def _organic_once(cls, items: list[OrganicItem]) -> list[OrganicItem]:
        _once([item.poi_id for item in items], "poi_id")
        return items

    @field_validator("exclude", "candidates")
    @classmethod
    def _ids_once(cls, ids: list[int] | None) -> list[int] | None:
        _once(ids or [], "ad_id")
        return ids


class RankedAd(BaseModel):
    """One ad of the page."""

    slot: Slot
    ad_id: AdId
    creative_id: CreativeId
    price: Payment = Field(description="Charged for a click on this ad; at most the bid.")
    pctr: Probability
    bid: Bid
    above: int = Field(ge=0, description="Organic results above this ad; 0 where the request named none.")


class RankResponse(BaseModel):
    """The page, already stored in the event log when it arrives."""

    request_id: Identity
    model_version: str = Field(description="Policy that answered: a bundle's version or the bootstrap policy's.")
    arm: str = Field(description="Experiment arm of the user; 'none' outside experiments.")
    city_id: CityId
    price_mode: str = Field(description="Price rule of this page.")
    ads: list[RankedAd] = Field(description="In slot order; empty if no ad is eligible.")
    degraded: list[str] = Field(description="What was missing or replaced; empty for a full answer. docs/serving.md lists the reasons.")


EventType = Literal["click", "purchase", "creative_click", "organic_click"]


class Event(BaseModel):
    """What a user did with a page: clicked on an ad, bought after it, opened its creative (nobody pays for that), or clicked on an organic result. Counted at most
    once for each (request_id, slot, type), or (request_id, rank) of an organic result."""

    model_config = _STRICT
    type: EventType
    request_id: Identity
    slot: Slot | None = Field(None, validate_default=True, description="Slot of the ad; needed but for an organic_click, which has none.")
    rank: Rank | None = Field(None, validate_default=True, description="Place of the organic result in the request's `organic`, from 1; of an organic_click alone, which needs it.")
    ad_id: AdId | None = Field(None, description="Checked against the ad shown in the slot, if given; an organic_click has none.")
    timestamp: Moment | None = Field(None, description="When it happened; default now.")
    order_value: OrderValue = Field(0.0, description="Value of the order, for purchases.")

    @field_validator("slot", "rank", "ad_id")
    @classmethod
    def _place(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Ads have a slot, organic results a rank."""
        kind = info.data.get("type")
        if kind is not None:  # else the type is wrong, and that is said
            organic = kind == "organic_click"
            if value is None and info.field_name == ("rank" if organic else "slot"):
                raise ValueError(f"{kind} needs {info.field_name}: {'the place of the organic result in the request, from 1' if organic else 'the slot of the ad'}")
            if value is not None and organic != (info.field_name == "rank"):
                raise ValueError(f"{kind} takes no {info.field_name}: {'an organic result is named by its rank' if organic else 'an ad is named by its slot'}")
        return value

    @field_validator("timestamp")
    @classmethod
    def _timestamp(cls, moment: datetime | float | None) -> datetime | None:
        return _time(moment)


class EventsRequest(BaseModel):
    """Events in any order."""

    model_config = _STRICT
    events: Annotated[list[Event], Field(fail_fast=True, min_length=1, max_length=MOST_EVENTS)]


class RejectedEvent(BaseModel):
    """An event that was not stored."""

    index: int = Field(description="Position in the request's list, from 0.")
    request_id: Identity
    slot: Slot | None = Field(None, description="As sent; absent for an organic_click.")
    rank: Rank | None = Field(None, description="As sent; of an organic_click alone.")
    reason: Literal["unknown_impression", "ad_mismatch"]


class EventsResponse(BaseModel):
    """What became of the events; repeating the call changes nothing."""

    accepted: int = Field(description="Stored by this call.")
    duplicates: int = Field(description="Already known; ignored.")
    rejected: list[RejectedEvent]


class ErrorBody(BaseModel):
    """Why a call was refused."""

    code: str = Field(description="Stable name, e.g. 'invalid_field'.")
    message: str = Field(description="What was wrong and what would be right.")
    field: str | None = Field(description="Path of the field in the body, e.g. 'bids.0.bid'; null if none.")


class ErrorResponse(BaseModel):
    """Body of every answer with a status of 400 or more."""

    error: ErrorBody
