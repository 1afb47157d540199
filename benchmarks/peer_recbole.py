"""RecBole's side of `ega bench peers`: a program for a Python of its own, where RecBole is installed and this project is not.

Reads one JSON object a line from standard input and answers each with one on standard output; what RecBole prints goes to standard error.
Requests: {"do": "prepare", "model", "folder", "settings"}, {"do": "train" | "load" | "score", "model", "steps"}; the end of the input ends it.
Everything is RecBole's own: Config, dataset from atomic files, data loaders, model, loss; the optimiser is Adam as its Trainer builds it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import cycle, islice
from typing import Any

DATASET = "interactions"
"""Name of the data set: <folder>/interactions/interactions.inter."""


class Peer:
    """One of RecBole's models with its prepared batches."""

    def __init__(self, model: str, folder: str, settings: dict[str, Any]) -> None:
        import torch
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, init_seed

        sys.argv = sys.argv[:1]  # RecBole's Config reads the command line
        torch.set_num_threads(settings["threads"])
        config = Config(model=model, dataset=DATASET, config_dict={**common(folder, settings), **SPECIFIC[model](settings)})
        init_seed(config["seed"], config["reproducibility"])
        torch.use_deterministic_algorithms(False)  # neither side pays for determinism
        kind = get_model(model)
        torch.autograd.set_detect_anomaly(False)  # importing RecBole's models turns it on (sine.py), for all of them, and it costs more than a small step
        dataset = create_dataset(config)
        self.train_data, _, self.test_data = data_preparation(config, dataset)
        self.model = kind(config, self.train_data.dataset)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=settings["learning_rate"])
        self.batches = list(islice(self.train_data, settings["prepared"]))
        self.asked = [found[0] for found in islice(self.test_data, settings["prepared_scoring"])]
        self.users = [len(found[1].unique()) if model == "DIN" else len(found[0]) for found in islice(self.test_data, settings["prepared_scoring"])]
        self.turn, self.scoring_turn, self.loading = cycle(self.batches), cycle(zip(self.asked, self.users, strict=True)), iter(self.train_data)
        self.full = hasattr(type(self.model), "full_sort_predict") and model == "SASRec"

    def describe(self) -> dict[str, Any]:
        """What both sides must agree on."""
        first = self.batches[0]
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad), "items": self.train_data.dataset.item_num - 1,
            "samples": len(self.train_data.dataset), "rows": len(first), "length": int(first["item_id_list"].shape[1]), "scoring_users": self.users[0],
        }  # fmt: skip

    def step(self, batch: Any) -> float:
        """One optimiser step, as RecBole's Trainer makes it."""
        self.optimiser.zero_grad()
        loss = self.model.calculate_loss(batch)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())

    def train(self, steps: int) -> dict[str, Any]:
        self.model.train()
        started = time.perf_counter()
        losses = [self.step(batch) for batch in islice(self.turn, steps)]
        return {"seconds": time.perf_counter() - started, "count": steps, "loss": losses[-1]}

    def load(self, steps: int) -> dict[str, Any]:
        """Batches made by the loader alone."""
        started, made = time.perf_counter(), 0
        while made < steps:
            for _ in islice(self.loading, steps - made):
                made += 1
            if made < steps:
                self.loading = iter(self.train_data)
        return {"seconds": time.perf_counter() - started, "count": made}

    def score(self, steps: int) -> dict[str, Any]:
        """Scores of all items (SASRec), or of the held-out item and its negatives (DIN)."""
        import torch

        self.model.eval()
        users, started = 0, time.perf_counter()
        with torch.no_grad():  # as its Trainer evaluates
            for batch, asked in islice(self.scoring_turn, steps):
                (self.model.full_sort_predict if self.full else self.model.predict)(batch)
                users += asked
        return {"seconds": time.perf_counter() - started, "count": users}


def common(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of both models."""
    return {
        "data_path": folder, "checkpoint_dir": os.path.join(folder, "saved"), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "use_gpu": False, "show_progress": False,
        "state": "ERROR", "seed": settings["seed"], "MAX_ITEM_LIST_LENGTH": settings["length"], "train_batch_size": settings["batch"], "learning_rate": settings["learning_rate"],
    }  # fmt: skip


def _sasrec(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_layers": settings["blocks"], "n_heads": settings["heads"], "hidden_size": settings["width"], "inner_size": settings["width"], "hidden_act": "relu", "loss_type": "CE",
        "hidden_dropout_prob": settings["dropout"], "attn_dropout_prob": settings["dropout"], "train_neg_sample_args": None, "eval_batch_size": settings["scoring_users"],
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    }  # fmt: skip


def _din(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "embedding_size": settings["width"], "mlp_hidden_size": [settings["width"]], "dropout_prob": 0.0, "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
        "eval_batch_size": settings["scoring_users"] * (settings["candidates"] + 1),
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": f"uni{settings['candidates']}"},
    }  # fmt: skip


SPECIFIC = {"SASRec": _sasrec, "DIN": _din}


def versions() -> dict[str, str]:
    """Of what this side runs on."""
    import numpy
    import recbole
    import torch

    return {"recbole": recbole.__version__, "torch": torch.__version__, "numpy": numpy.__version__, "python": sys.version.split()[0]}


def main() -> None:
    """Answer until the input ends. An error is an answer too: {"error": text}."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peers: dict[str, Peer] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                peers[request["model"]] = peer = Peer(request["model"], request["folder"], request["settings"])
                answer = {**peer.describe(), "versions": versions()}
            else:
                answer = getattr(peers[request["model"]], request["do"])(request["steps"])
        except Exception as error:  # noqa: BLE001 - reported to the caller, who stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
