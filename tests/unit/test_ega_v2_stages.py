"""EGA (V2) learns: from features to codes, from histories to pages, on a task whose best possible loss is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.bundle import state_bytes
from model.ega_v2.beam import Catalogue, Offers, search
from model.ega_v2.config import SearchConfig
from model.ega_v2.network import EgaV2, History, NetworkConfig, TokenSizes
from model.ega_v2.stages import PretrainConfig, Sequences, pretrain, tokenize
from model.ega_v2.tokenizer import TokenizerConfig, TokenizerError
from model.training.loop import Device

POIS, KEPT, CREATIVES = 40, 0.8, 2
NETWORK = NetworkConfig(width=32, heads=2, encoder_blocks=1, decoder_blocks=1, feed_forward=2, behaviours=4, slots=2, reward_blocks=1)
CONFIG = PretrainConfig(steps=200, batch=64, learning_rate=6e-3, warmup=20, validate_every=100)


def features(items: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(items, 8))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """Codes of 40 POIs and of their 80 creatives."""
    folder = tmp_path_factory.mktemp("tokens")
    config = TokenizerConfig(layers=2)
    return tokenize(features(POIS), config, folder / "poi").encode(features(POIS)), tokenize(features(80, 1), config, folder / "creative").encode(features(80, 1))


def sequences(count: int, seed: int, tokens: tuple[np.ndarray, np.ndarray]) -> tuple[Sequences, np.ndarray]:
    """First slot: with 80 % the newest POI of the history, else any. Second: what follows the first in a fixed round. Creative: user's taste."""
    poi, creative = tokens
    rng = np.random.default_rng(seed)
    seen, taste = rng.integers(0, POIS, (count, 4)), rng.integers(0, 2, count)
    first = np.where(rng.random(count) < KEPT, seen[:, -1], rng.integers(0, POIS, count))
    page = np.stack([first, (first * 7 + 3) % POIS], 1)
    none = np.zeros((count, 4, 0), np.int64)
    history = History(*(torch.from_numpy(x) for x in (poi[seen], np.full((count, 4, 2), -1), none, taste[:, None] + 1)))
    return Sequences(history, torch.from_numpy(poi[page]), torch.from_numpy(creative[page * CREATIVES + taste[:, None]])), page


def network(tokens: tuple[np.ndarray, np.ndarray]) -> EgaV2:
    torch.manual_seed(0)
    poi, creative = tokens
    return EgaV2(NETWORK, TokenSizes(2, int(poi.max()) + 1, 2, int(creative.max()) + 1, user_fields=(3,)))


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory) -> EgaV2:
    model = network(tokens)
    data = [sequences(count, seed, tokens)[0] for count, seed in ((6000, 1), (500, 2))]
    result = pretrain(model, *data, CONFIG, tmp_path_factory.mktemp("pretrain"), {}, Device(threads=1))
    model.last = result.history[-1]
    return model


def test_the_generator_reaches_the_entropy_of_its_task(tokens, trained) -> None:
    """Codes of slot 1 cannot be known better than the coin that drew them; all others can be known."""
    poi = tokens[0]
    own, other = KEPT + (1 - KEPT) / POIS, (1 - KEPT) / POIS
    entropy = -own * math.log(own) - (POIS - 1) * other * math.log(other)
    assert len(np.unique(poi, axis=0)) == POIS
    best, naive = entropy / 4, math.log(POIS) / 2  # four codes a page; not knowing the history
    assert best - 0.03 < trained.last["ntp"] < best + 0.05 * (naive - best)
    assert trained.last["mtp"] < 0.05 and trained.last["creative_accuracy"] > 0.98
    assert trained.last["poi_accuracy"] == pytest.approx((own + 1) / 2, abs=0.04)


@torch.inference_mode()
def test_the_search_finds_the_pages_that_were_learned(tokens, trained) -> None:
    """First page of the beam without money, 200 unseen requests; and money moves it."""
    poi, creative = tokens
    data, _ = sequences(200, 3, tokens)
    catalogue = Catalogue(poi, int(poi.max()) + 1, np.repeat(np.arange(POIS), CREATIVES), creative, int(creative.max()) + 1)
    bid = torch.ones(200, POIS)
    offers = Offers(bid, bid > 0, bid, torch.zeros(200, 0, 2, dtype=torch.int64), torch.zeros(200, 0, 2, dtype=torch.int64))
    newest = (data.history.poi[:, -1].unsqueeze(1) == torch.from_numpy(poi)).all(-1).int().argmax(1)
    taste = data.history.user[:, 0] - 1
    expected = torch.stack([newest, (newest * 7 + 3) % POIS], 1)

    def pages(config: SearchConfig, offers: Offers):
        return search(trained.decoder(data.history, config.beams, 2), catalogue, offers, 2, config, requests_at_once=50)

    found = pages(SearchConfig(beams=8, alpha=0.0), offers)
    alone = expected[:, 0] != expected[:, 1]  # where the round leads to itself the page cannot show it twice
    assert float((found.ad[:, 0] == expected).all(1)[alone].float().mean()) > 0.95
    assert float((found.creative[:, 0] == expected * CREATIVES + taste[:, None])[alone].float().mean()) > 0.95
    rich = bid.clone()
    rich[:, 5] = 1e6
    assert bool((pages(SearchConfig(beams=8), replace(offers, bid=rich)).ad[:, 0] == 5).any(1).all())


def test_killed_and_resumed_it_is_the_same(tokens, tmp_path) -> None:
    data = [sequences(count, seed, tokens)[0] for count, seed in ((300, 1), (50, 2))]
    short = replace(CONFIG, steps=6, validate_every=3, warmup=1)
    whole, parts = network(tokens), network(tokens)
    pretrain(whole, *data, short, tmp_path / "whole", {}, Device(threads=1))

    class Killed(Exception):
        pass

    logits, calls = parts.page_logits, []

    def dies(*arguments):
        calls.append(None)
        if len(calls) > 7:
            raise Killed
        return logits(*arguments)

    parts.page_logits = dies
    with pytest.raises(Killed):
        pretrain(parts, *data, short, tmp_path / "parts", {}, Device(threads=1))
    again = network(tokens)
    assert pretrain(again, *data, short, tmp_path / "parts", {}, Device(threads=1)).steps == 6
    assert state_bytes(again) == state_bytes(whole)


def test_a_tokenizer_that_lies_there_is_used_and_another_is_refused(tmp_path) -> None:
    config = TokenizerConfig(layers=2)
    first = tokenize(features(POIS), config, tmp_path / "poi")
    assert tokenize(features(10), config, tmp_path / "poi").codebooks.tobytes() == first.codebooks.tobytes()
    with pytest.raises(TokenizerError, match="another configuration"):
        tokenize(features(POIS), replace(config, layers=3), tmp_path / "poi")
    with pytest.raises(TokenizerError, match="not healthy"):
        tokenize(features(POIS), replace(config, codes=64), tmp_path / "sick")
    assert not (tmp_path / "sick").exists()
