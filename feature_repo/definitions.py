"""Feast definitions: `cd feature_repo && feast apply` registers them. Field types derive from the logs' schema.

Sources are Parquet files in `data/` below the store's folder; `features.build` writes them from logs.
"""

from __future__ import annotations

from datetime import timedelta

import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, Field, FileSource, Project, PushSource, ValueType
from feast.types import Array, Float32, Float64, Int32, Int64, String

from features.store import PUSH_SOURCE, RANKING_SERVICE, SOURCES
from marketplace.schema import OPTIONAL_TABLES, TABLES

OWNER = {"owner": "ads-ranking"}
FOREVER = timedelta(0)  # the online store knows no ttl; one offline only would make training and serving differ
_TYPES = {pa.int32(): Int32, pa.int64(): Int64, pa.float32(): Float32, pa.float64(): Float64, pa.string(): String}
_MEANINGS = {column.name: " ".join(filter(None, [column.meaning, f"[{column.unit}]" if column.unit else ""])) for table in (OPTIONAL_TABLES | TABLES).values() for column in table.columns}
_MEANINGS |= {
    "behaviour_count": "Number of real entries at the front of the arrays; zeros follow.",
    "time_us": "When each behaviour happened [microseconds since 1970 UTC].",
    "impressions": "Times the ad was shown before this row's day.",
    "clicks": "Clicks on the ad before this row's day.",
    "shown_creative_id": "The ad's creative with the best smoothed click rate before this row's day: what a model shows that chooses none.",
}

_EMBEDDING = "State of the ad in the model, width D of the model version."


def _fields(view: str) -> list[Field]:
    """Join key and features of a view, typed and described by its source's schema."""
    fields = []
    for column in SOURCES[view]:
        if column.name in ("event_timestamp", "created"):
            continue
        many = pa.types.is_list(column.type)
        dtype = _TYPES[column.type.value_type if many else column.type]
        meaning = _EMBEDDING if view == "ad_embeddings" and column.name == "embedding" else _MEANINGS.get(column.name, "")
        fields.append(Field(name=column.name, dtype=Array(dtype) if many else dtype, description=meaning))
    return fields


def _file(view: str) -> FileSource:
    return FileSource(name=f"{view}_file", path=f"data/{view}.parquet", timestamp_field="event_timestamp", created_timestamp_column="created")


project = Project(name="ega", description="Generative advertising: features of users and ads.")
user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64, description="A user of the platform.")
creative = Entity(name="creative", join_keys=["creative_id"], value_type=ValueType.INT64, description="A creative of an ad.")
ad = Entity(name="ad", join_keys=["ad_id"], value_type=ValueType.INT64, description="An ad of the catalogue.")

profile_file, behaviors_file, catalog_file, creatives_file, embeddings_file = (
    _file(view) for view in ("user_profile", "user_behaviors", "ad_catalog", "ad_creatives", "ad_embeddings")
)
behaviors_push = PushSource(name=PUSH_SOURCE, batch_source=behaviors_file, description="Behaviours as they happen; use features.store.push_behaviours, which merges.")

user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    ttl=FOREVER,
    source=profile_file,
    schema=_fields("user_profile"),
    tags=OWNER,
    description="Profile that holds from its time on; no window.",
)
user_behaviors = FeatureView(
    name="user_behaviors",
    entities=[user],
    ttl=FOREVER,
    source=behaviors_push,
    schema=_fields("user_behaviors"),
    tags=OWNER,
    description="The user's newest L behaviours up to and including the row's time, newest first; window: all history.",
)
ad_catalog = FeatureView(
    name="ad_catalog",
    entities=[ad],
    ttl=FOREVER,
    source=catalog_file,
    schema=_fields("ad_catalog"),
    online=False,
    tags=OWNER,
    description="An ad on a day: place, bid, reserve, and counts of all days before it.",
)
ad_creatives = FeatureView(
    name="ad_creatives",
    entities=[creative],
    ttl=FOREVER,
    source=creatives_file,
    schema=_fields("ad_creatives"),
    online=False,
    tags=OWNER,
    description="Creatives of the ads with their image and text embeddings; no rows where every ad has one.",
)
ad_embeddings = FeatureView(
    name="ad_embeddings",
    entities=[ad],
    ttl=FOREVER,
    source=embeddings_file,
    schema=_fields("ad_embeddings"),
    online=False,
    tags=OWNER,
    description="Ad states of a model version, read as one matrix.",
)
ranking = FeatureService(name=RANKING_SERVICE, features=[user_profile, user_behaviors], tags=OWNER, description="What one ranking request reads online about its user.")
ranking_ads = FeatureService(name="ega_v1_ads", features=[ad_catalog, ad_creatives, ad_embeddings], tags=OWNER, description="What ranking reads offline about ads.")

OBJECTS = [
    project, user, ad, creative, profile_file, behaviors_file, catalog_file, creatives_file, embeddings_file, behaviors_push,
    user_profile, user_behaviors, ad_catalog, ad_creatives, ad_embeddings, ranking, ranking_ads,
]  # fmt: skip
