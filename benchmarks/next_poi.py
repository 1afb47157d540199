"""Next place on check-ins: `ega bench next-poi --data DIR`. Every user's last check-in is the test, the one before the validation.

Candidates are all places of the city. EGA-V1's encoder reads behaviours by the schema's fields relative to the request (age, hour
distance, weekday match, distance) and is compared with counting baselines on the same check-ins (marketplace.counting).
Shape letters: R requests, B of a batch, L behaviours (newest first), N candidates, V rows of an id table, D width.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from features.encoding import Histories, Profiles, Vocabulary, encode_ads, encode_requests
from marketplace import counting, schema
from marketplace.checkins import category_labels, read_checkins
from model.ega_v1.network import AD_COLUMNS, BEHAVIOUR_COLUMNS, HybridFeatures, NetworkConfig, RecFormer, VocabularySizes, geo_prior
from model.evaluation.metrics import mean_and_interval
from model.layers import MLP, SplitHead

CUTS = (1, 5, 10)
"""k of Acc@k."""


@dataclass(frozen=True)
class Settings:
    """Sizes and training."""

    width: int = 32
    """D."""
    embedding: int = 16
    """Width of a field's embedding."""
    blocks: int = 1
    """m, behaviour blocks."""
    heads: int = 2
    """H."""
    behaviours: int = 64
    """Newest behaviours that the encoder attends to."""
    history: int = 256
    """Newest behaviours that the explicit crosses count."""
    recent: int = 60
    """Newest training requests of each user: habits of last year are poor teachers, and the training time stays bounded."""
    own: int = 64
    """Own earlier places among the candidates of a training request."""
    drawn: int = 64
    """Other places among them, drawn by popularity ^ 0.75."""
    batch: int = 128
    """Requests of a batch."""
    learning_rate: float = 3e-3
    """Adam's, falling to 0 along a cosine."""
    learning_rate_on_top: float = 3e-4
    """The same for an encoder that learns what trained crosses leave."""
    epochs: int = 2
    """Passes over the training requests."""
    dropout: float = 0.1
    """On tokens and on h_i."""
    validations: int = 2
    """An epoch."""
    validation_users: int = 1000
    """Of a validation."""


class City:
    """The check-ins of one city as arrays: who, where and when, sorted by user and time."""

    def __init__(self, data: Path) -> None:
        self.checkins, self.pois = read_checkins(data)
        labels = category_labels(self.pois)
        self.pois["category_id"] = pd.factorize(labels, sort=True)[0] + 1  # 0: unknown
        rows = np.searchsorted(self.pois["poi_id"], self.checkins["poi_id"])
        self.poi_row = rows
        self.place = self.pois[["latitude", "longitude"]].to_numpy(np.float64)
        self.category = self.pois["category_id"].to_numpy(np.int64)
        self.time_us = self.checkins["event_timestamp"].astype("int64").to_numpy()
        self.offset = 60 * round(float(self.place[:, 1].mean()) / 15.0)
        """Local time minus UTC in minutes, whole hours from the mean longitude."""
        _, self.user, count = np.unique(self.checkins["user_id"], return_inverse=True, return_counts=True)
        self.end = np.cumsum(count)
        self.start = self.end - count
        ids = self.pois["poi_id"].to_numpy()
        cells = schema.geo_cell(self.place[:, 0], self.place[:, 1])
        self.vocabulary = Vocabulary.learn({"ad": [ids], "poi": [ids], "category": [self.category], "geo": [cells], "advertiser": [], "creative": []})
        catalogue = pd.DataFrame({"ad_id": ids, "poi_id": ids, "advertiser_id": 0, "creative_id": 0, "category_id": self.category, "price_band": 0, "latitude": self.place[:, 0], "longitude": self.place[:, 1]})
        self.ad_fields = encode_ads(self.vocabulary, catalogue)

    def rows_before(self, rows_R: np.ndarray, length: int) -> np.ndarray:
        """Check-in rows of the `length` newest behaviours before check-ins `rows_R`, newest first, -1 padding; [R, length]."""
        at = rows_R[:, None] - 1 - np.arange(length)
        return np.where(at >= self.start[self.user[rows_R]][:, None], at, -1)

    def homes(self, until_U: np.ndarray) -> np.ndarray:
        """Median place of each user's check-ins before row `until_U`; the city's median where there is none. [U, 2]."""
        known = np.arange(len(self.user)) < until_U[self.user]
        at = pd.DataFrame(self.place[self.poi_row[known]]).groupby(self.user[known]).median().reindex(np.arange(len(self.end)))
        return at.fillna(pd.Series(np.median(self.place, axis=0))).to_numpy()

    def encode(self, rows_R: np.ndarray, length: int, homes_U2: np.ndarray) -> dict[str, np.ndarray]:
        """What the model reads about requests made at the times of check-ins `rows_R`, from the place of the check-in before."""
        before = self.rows_before(rows_R, length)
        count, at = (before >= 0).sum(1), before.clip(min=0)
        real = before >= 0
        poi = self.poi_row[at]
        columns = {
            "behaviour_id": at, "poi_id": self.pois["poi_id"].to_numpy()[poi], "category_id": self.category[poi],
            "action": np.full(at.shape, schema.ACTION_VISIT), "latitude": self.place[poi, 0], "longitude": self.place[poi, 1], "creative_id": np.zeros_like(at), "time_us": self.time_us[at],
        }  # fmt: skip
        # Check-ins of the request's own second (times are often whole minutes) are no past.
        histories = Histories(count, **{name: np.where(real, values, 0) for name, values in columns.items()}).before(self.time_us[rows_R])
        home = homes_U2[self.user[rows_R]]
        here = np.where(histories.count[:, None] > 0, np.stack([histories.latitude[:, 0], histories.longitude[:, 0]], 1), home)
        zero = np.zeros(len(rows_R), np.int64)
        profiles = Profiles(np.ones(len(rows_R), bool), zero, zero, home[:, 0], home[:, 1])
        encoded = encode_requests(self.vocabulary, profiles, histories, here[:, 0], here[:, 1], self.time_us[rows_R], np.full(len(rows_R), self.offset))
        return {**encoded, "request_place": here}

    def requests(self, rows_R: np.ndarray) -> pd.DataFrame:
        """The same requests in the log's columns, for the counting baselines."""
        return pd.DataFrame({"user_id": self.checkins["user_id"].to_numpy()[rows_R], "event_timestamp": self.checkins["event_timestamp"].iloc[rows_R].reset_index(drop=True), "utc_offset_minutes": self.offset})

    def behaviours(self) -> pd.DataFrame:
        """All check-ins in the log's columns."""
        frame = self.checkins[["user_id", "poi_id", "event_timestamp"]].copy()
        return frame.assign(behaviour_id=np.arange(len(frame)), action=schema.ACTION_VISIT)


class HabitCrosses(nn.Module):
    """Explicit user x place crosses as one logit: learned counts of the user's earlier visits, the newest of them, what usually follows, distance, and popularity.

    A count is a sum over behaviours that match the candidate (same place, same place after the current one, same category, same
    geo cell) of exp(weights of the behaviour's age, hour distance and weekday match): the counting baseline with its kernel learned.
    The newest visit says what a sum cannot: that a habit has just been followed. Moves between categories and hours of categories are everybody's.
    """

    FIELDS = ("age", "hour_distance", "weekday_match")
    MATCHES = (("place", "poi"), ("follows", "poi"), ("category", "category"), ("cell", "geo"))
    FARTHEST = 32
    """Check-ins ago that are told apart for the newest visit of a place."""

    def __init__(self, sizes: VocabularySizes, visits_V: Tensor, hidden: int = 32) -> None:
        super().__init__()
        rows = {field.name: sizes.rows(field) for field in schema.BEHAVIOUR_FIELDS}
        self.vocabulary = {column: getattr(sizes, column) for _, column in self.MATCHES}
        self.kernels = nn.ModuleDict({name: nn.ModuleList(nn.Embedding(rows[field], 1) for field in self.FIELDS) for name, _ in self.MATCHES})
        with torch.no_grad():  # places start as the hour-weighted count, all else as plain counts
            for table in self.kernels.parameters():
                nn.init.zeros_(table)
            age, hour, day = self.kernels["place"]
            edges = np.array([0, *schema.AGE_BUCKET_HOURS, 2 * schema.AGE_BUCKET_HOURS[-1]])
            age.weight[schema.FIRST_CODE :, 0] = -torch.from_numpy(np.sqrt(edges[:-1].clip(min=0.5) * edges[1:])).float() / (24 * counting.AGE_DECAY_DAYS)
            hour.weight[schema.FIRST_CODE :, 0] = -torch.arange(len(hour.weight) - schema.FIRST_CODE) / counting.HOUR_DECAY
            day.weight[schema.FIRST_CODE, 0] = math.log(counting.OTHER_DAY_TYPE)
        self.distance = nn.Embedding(len(schema.DISTANCE_BUCKET_KM) + 1, 4)
        self.register_buffer("visits", visits_V)
        self.register_buffer("edges", torch.tensor(schema.DISTANCE_BUCKET_KM))
        self.since, self.hour = nn.Embedding(rows["age"], 4), nn.Embedding(24 + schema.FIRST_CODE, 4)
        self.newest, self.ago = nn.Embedding(rows["age"], 4), nn.Embedding(self.FARTHEST + 2, 4)
        self.category, self.after, self.at_hour = (nn.Embedding(count, 8) for count in (sizes.category, sizes.category, 24 + schema.FIRST_CODE))
        for table in (self.category, self.after, self.at_hour):
            nn.init.normal_(table.weight, 0.0, 0.3)
        self.mlp = MLP(len(self.MATCHES) + 1 + 5 * 4 + 3 + 2, (hidden,), 1)
        nn.init.zeros_(self.mlp.layers[-1].weight)
        self.transition, self.unseen = nn.Parameter(torch.tensor(math.log(counting.TRANSITION_WEIGHT))), nn.Parameter(torch.tensor(-4.0))
        """Logs of the weight of the share of earlier moves from here to the candidate, and of what a place without a visit counts."""

    def forward(self, behaviours_BLF: Tensor, ad_fields_BNF: Tensor, ad_place_BN2: Tensor, request_place_B2: Tensor, hour_B: Tensor, less_own: bool) -> Tensor:
        """Logits [B, N]; hour_B, encoded hour of the request; less_own: the first candidate is a training request's own target."""
        column = {name: behaviours_BLF[..., BEHAVIOUR_COLUMNS.index(name)] for name in ("poi", "category", "geo", *self.FIELDS)}
        real = column["poi"] != schema.PADDING
        # Newest first: what follows behaviour j+1 in time is j.
        follows = F.pad(column["poi"][:, 1:] == column["poi"][:, :1], (0, 1)) & real
        hours, days = (table.num_embeddings for table in self.kernels["place"][1:])
        cell = (column["age"] * hours + column["hour_distance"]) * days + column["weekday_match"]
        counts, kernels = [], {}
        for name, vocabulary in self.MATCHES:
            age, hour, day = (table.weight.squeeze(-1) for table in self.kernels[name])
            kernels[name] = torch.exp(age[:, None, None] + hour[:, None] + day).flatten()  # all combinations once, then one look-up a behaviour
            weight = kernels[name][cell] * (follows if name == "follows" else real)
            total = weight.new_zeros(len(weight), self.vocabulary[vocabulary]).scatter_add(1, column[vocabulary], weight)
            code = ad_fields_BNF[..., AD_COLUMNS.index(vocabulary)]
            # Unknown ids match nothing: "unknown" is no place.
            counts.append(torch.where(code > schema.UNKNOWN, torch.gather(total, 1, code.expand(len(total), -1)), 0.0))
        place, moves = counts[0], counts[1]
        share = moves / torch.where(follows, kernels["follows"][cell], 0.0).sum(1, keepdim=True).clamp(min=1e-6)
        habit = torch.log(place + self.transition.exp() * share + self.unseen.exp())
        count = torch.log1p(torch.stack(counts, -1))
        north = (ad_place_BN2[..., 0] - request_place_B2[:, None, 0]) * 111.2
        east = (ad_place_BN2[..., 1] - request_place_B2[:, None, 1]) * 111.2 * torch.cos(torch.deg2rad(request_place_B2[:, None, 0]))
        far = self.distance(torch.bucketize(torch.hypot(north, east), self.edges))
        poi = ad_fields_BNF[..., AD_COLUMNS.index("poi")].expand(len(count), -1)
        here = (poi == column["poi"][:, :1]) & real[:, :1]
        known = torch.log1p(real.sum(1, keepdim=True).float()).expand(-1, poi.shape[1])
        visits = self.visits[poi]
        if less_own:  # the training target's own visit is among its visits; no other candidate has such help
            visits = torch.cat([visits[:, :1] - 1.0, visits[:, 1:]], 1)
        extra = torch.stack([torch.log1p(visits), here.float(), known], -1)
        # What the candidates share matters through what it does to the rest: minutes after a visit other places come next than a day later.
        moment = torch.cat([self.since(column["age"][:, 0]), self.hour(hour_B)], -1).unsqueeze(1).expand(-1, poi.shape[1], -1)
        length = real.shape[1]
        ago = torch.arange(length).masked_fill(~real, length)
        newest = ago.new_full((len(real), self.vocabulary["poi"]), length).scatter_reduce(1, column["poi"], ago, "amin")
        at = torch.gather(newest, 1, poi)  # `length`: never
        last = torch.cat([self.newest(torch.gather(F.pad(column["age"], (0, 1)), 1, at)), self.ago(at.clamp(max=self.FARTHEST) + (at == length))], -1)
        to = self.category(ad_fields_BNF[..., AD_COLUMNS.index("category")]).expand(len(count), -1, -1)
        usual = torch.stack([(given.unsqueeze(1) * to).sum(-1) for given in (self.after(column["category"][:, 0]), self.at_hour(hour_B))], -1)
        return habit + self.mlp(torch.cat([count, habit.unsqueeze(-1), far, extra, moment, last, usual], -1)).squeeze(-1)


class NextPoiNetwork(nn.Module):
    """EGA-V1's hybrid features, RecFormer and pCTR head with all places as candidates, each on its own; optionally with HabitCrosses. With `trained` crosses
    these stay as they are and the encoder starts from nothing: it learns what they leave."""

    def __init__(self, city: City, settings: Settings, visits_V: np.ndarray, encoder: bool, crosses: bool, trained: HabitCrosses | None = None) -> None:
        super().__init__()
        self.settings = settings
        tables = {name: len(city.vocabulary.tables[name]) + schema.FIRST_CODE for name in schema.VOCABULARIES}
        sizes = VocabularySizes(**tables)
        config = NetworkConfig(
            width=settings.width, embedding=settings.embedding, blocks=settings.blocks, heads=settings.heads, feed_forward=2, fusion="late",
            gcf_on_ads=False, exact_behaviours=settings.behaviours + 1, qkv_activation="none",
        )  # fmt: skip
        self.features = self.recformer = self.head = None
        if encoder:
            cells = np.full((tables["geo"], 2), np.nan)
            cells[schema.FIRST_CODE :] = np.stack(schema.geo_centre(city.vocabulary.tables["geo"]), 1)
            self.features = HybridFeatures(config, sizes, geo_prior(cells, settings.embedding, torch.Generator().manual_seed(0)))
            self.recformer, self.head = RecFormer(config), SplitHead(settings.width, (2 * settings.width,))
        self.crosses = HabitCrosses(sizes, torch.from_numpy(visits_V).float()) if crosses else None
        if trained is not None:
            self.crosses.load_state_dict(trained.state_dict())
            self.crosses.requires_grad_(False)
            for parameter in self.head.rest.layers[-1].parameters():
                nn.init.zeros_(parameter)
        self.dropout = nn.Dropout(settings.dropout)
        self.register_buffer("ad_fields", torch.from_numpy(city.ad_fields).long())
        self.register_buffer("ad_place", torch.from_numpy(city.place).float())

    def forward(self, batch: dict[str, Tensor], candidate_BN: Tensor | None = None) -> Tensor:
        """Logits [B, N] of training candidates (rows of the places, the target first), or of all places."""
        fields = self.ad_fields.unsqueeze(0) if candidate_BN is None else self.ad_fields[candidate_BN]
        place = self.ad_place.unsqueeze(0) if candidate_BN is None else self.ad_place[candidate_BN]
        logits = 0.0
        if self.features is not None:
            user = self.features.user(batch["user_fields"], batch["context_fields"])
            tokens, mask = self.features.behaviours(batch["behaviours"][:, : self.settings.behaviours], user)
            ads = self.features.ads(fields)
            h = self.recformer(self.dropout(ads), torch.ones(ads.shape[:2], dtype=torch.bool), self.dropout(tokens), mask)
            logits = self.head(self.dropout(h), user)
        if self.crosses is not None:
            logits = logits + self.crosses(batch["behaviours"], fields, place, batch["request_place"], batch["context_fields"][:, 0], less_own=candidate_BN is not None)
        return logits


def tensors(encoded: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values).float() if name == "request_place" else torch.from_numpy(values).long() for name, values in encoded.items()}


def training_candidates(city: City, rows: np.ndarray, settings: Settings, chance_N: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places a training request is ranked among, target first, and the log of how often each is drawn; [B, N], masked ones -inf.

    The user's own newest places are always among them: they are what the target has to be told from.
    """
    target = city.poi_row[rows]
    before = city.rows_before(rows, settings.own)
    own = np.where(before >= 0, city.poi_row[before.clip(min=0)], -1)
    drawn = rng.choice(len(chance_N), (len(rows), settings.drawn), p=chance_N)
    candidate = np.concatenate([target[:, None], own, drawn], 1)
    log_q = np.concatenate([np.zeros((len(rows), 1 + settings.own)), np.log(np.minimum(settings.drawn * chance_N[drawn], 1.0))], 1)
    order = np.argsort(candidate, axis=1, kind="stable")
    ordered = np.take_along_axis(candidate, order, 1)
    again = np.concatenate([np.zeros((len(rows), 1), bool), ordered[:, 1:] == ordered[:, :-1]], 1) | (ordered < 0)
    repeated = np.zeros_like(again)
    np.put_along_axis(repeated, order, again, 1)  # stable: the first of equals stays, so the target and own places do
    return candidate.clip(min=0), np.where(repeated, np.inf, log_q)


@torch.inference_mode()
def scores(network: NextPoiNetwork, city: City, rows: np.ndarray, homes: np.ndarray, cells: int = 200_000) -> np.ndarray:
    """Logits of all places for requests `rows`, [R, N], about `cells` of them at a time."""
    network.eval()
    batch = max(1, cells // len(city.pois))
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return np.concatenate([network(tensors(city.encode(part, network.settings.history, homes))).numpy() for part in parts])


def target_ranks(score_RN: np.ndarray, target_R: np.ndarray) -> np.ndarray:
    """Places that do not score below the target: ties, and NaN, fall against it."""
    return (~(score_RN < np.take_along_axis(score_RN, target_R[:, None], 1))).sum(1) - 1


def train(
    city: City, settings: Settings, hold: int, encoder: bool, crosses: bool, seed: int, name: str, trained: HabitCrosses | None = None
) -> tuple[NextPoiNetwork, dict[str, Any]]:
    """Fit on all check-ins before the validation's, on top of `trained` crosses if there are such; the weights with the best mean reciprocal rank of the
    validation's are kept, with crosses on top of which nothing helps the first ones."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    test = city.end - hold
    limit = test - 1  # the validation's row of each user
    row = np.arange(len(city.user))
    training = row[(row < limit[city.user]) & (row > city.start[city.user]) & (row >= limit[city.user] - settings.recent)]
    held = np.bincount(city.poi_row[row < limit[city.user]], minlength=len(city.pois))
    chance = (held + 1.0) ** 0.75
    chance /= chance.sum()
    network = NextPoiNetwork(city, settings, np.concatenate([np.zeros(schema.FIRST_CODE), held]), encoder, crosses, trained)
    homes = city.homes(limit)
    validation = limit[limit > city.start]
    validation = np.sort(rng.permutation(validation)[: settings.validation_users])
    if not len(training) or not len(validation):
        raise ValueError("too few check-ins a user to train and validate on; at least three are needed")
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(learnt, settings.learning_rate if trained is None else settings.learning_rate_on_top)
    steps = settings.epochs * math.ceil(len(training) / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    every = max(1, steps // (settings.epochs * settings.validations))
    best, kept, course, total, step = -1.0, None, [], 0.0, 0
    started = time.perf_counter()

    def validate() -> None:
        nonlocal best, kept, total
        rank = target_ranks(scores(network, city, validation, homes), city.poi_row[validation])
        figure = float(np.mean(1.0 / (1.0 + rank)))
        course.append({"step": step, "loss": total / every, "mrr": figure, **{f"acc@{k}": float(np.mean(rank < k)) for k in CUTS}})
        total = 0.0
        if figure > best:
            best, kept = figure, copy.deepcopy(network.state_dict())

    if trained is not None:
        validate()
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for _ in range(settings.epochs):
            order = rng.permutation(training)
            for start in range(0, len(order), settings.batch):
                rows = order[start : start + settings.batch]
                network.train()
                candidate, log_q = training_candidates(city, rows, settings, chance, rng)
                logits = network(tensors(city.encode(rows, settings.history, homes)), torch.from_numpy(candidate))
                loss = -torch.log_softmax(logits - torch.from_numpy(log_q).float(), 1)[:, 0].mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                total, step = total + float(loss.detach()), step + 1
                bar.update()
                if step % every == 0 or step == steps:
                    validate()
                    bar.set_postfix(loss=f"{course[-1]['loss']:.3f}", **{f"acc{k}": f"{course[-1][f'acc@{k}']:.3f}" for k in CUTS})
    network.load_state_dict(kept)
    return network, {"steps": steps, "seconds": time.perf_counter() - started, "course": course}


BASELINES = ("most_visited", "hour_weighted")
CROSSES, ALONE, HEADLINE, BAR = "explicit crosses alone", "EGA-V1 encoder alone", "EGA-V1 encoder + crosses", "hour_weighted"


def counting_scores(city: City, rows: np.ndarray, name: str) -> np.ndarray:
    """A counting baseline over all places, ties by popularity; [R, N]."""
    ids, requests, behaviours = city.pois["poi_id"].to_numpy(), city.requests(rows), city.behaviours()
    crowd = np.asarray(counting.popularity(behaviours, requests, ids), np.float64)
    return counting.SCORERS[name](behaviours, requests, ids) + 1e-6 * crowd / (crowd.max() + 1)


def next_poi(data: Path, seed: int = 0, quick: bool = False, hold: int = 1) -> dict[str, Any]:
    """Acc@1, 5 and 10 on the check-in `hold` places from each user's end; all later ones are unknown to every model."""
    city = City(data)
    settings = replace(Settings(), epochs=1, recent=2, validations=1, width=16, embedding=8, behaviours=16, history=32) if quick else Settings()
    rows = city.end - hold
    rows = rows[rows > city.start]  # a user without an earlier check-in has no history to read
    if not len(rows):
        raise ValueError(f"{data}: no user has more than {hold} check-in(s); there is nothing to hold out")
    user, target = city.user[rows], city.poi_row[rows]
    hits, courses = {}, {}
    for name in BASELINES:
        hits[name] = target_ranks(counting_scores(city, rows, name), target)
    habits = None
    for name in (CROSSES, ALONE, HEADLINE):
        network, courses[name] = train(city, settings, hold, name != CROSSES, name != ALONE, seed, name, habits if name == HEADLINE else None)
        habits = network.crosses if name == CROSSES else habits
        hits[name] = target_ranks(scores(network, city, rows, city.homes(city.end - hold)), target)
    table = []
    for name, rank in hits.items():
        row: dict[str, Any] = {"model": name}
        for k in CUTS:
            mean, low, high = mean_and_interval((rank < k).astype(np.float64), user)
            row[f"Acc@{k}"] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        table.append(row)
    ahead = {}
    for k in CUTS:
        mean, low, high = mean_and_interval((hits[HEADLINE] < k).astype(np.float64) - (hits[BAR] < k), user)
        ahead[k] = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    table.append({"model": f"{HEADLINE} over {BAR}, paired", **{f"Acc@{k}": ahead[k] for k in CUTS}})
    return {
        "users": len(rows), "places": len(city.pois), "checkins": len(city.user), "held_out_from_end": hold, "seed": seed,
        "config": asdict(settings), "courses": courses,
        "accuracy": {name: {f"acc@{k}": float(np.mean(rank < k)) for k in CUTS} for name, rank in hits.items()}, "table": table,
    }  # fmt: skip
