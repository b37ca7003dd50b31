"""A run's folder as training writes it, without training: skewed load that a bias evens out, in seconds.

    run = make_run(folder, layers=26, experts=64, ranks=8, steps=200)
    run.advance(1)  # a further step, as a reader that follows sees it

Counts of sampled steps come from tokens that choose `top_k` experts each, so that domains, pairs and counts
agree; those of other steps are drawn as sums.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe.telemetry.load import LoadWindow, dead, entropy, max_vio
from moe.telemetry.rows import JsonLines, replace_file, trim_after

DOMAINS = ("code", "law", "mathematics", "news", "speech")
HIDDEN = 512


def make_run(
    folder: Path,
    *,
    layers: int = 4,
    experts: int = 16,
    ranks: int = 4,
    steps: int = 20,
    seed: int = 0,
    top_k: int = 4,
    tokens: int = 2048,
    total_steps: int = 10_000,
    mtp: bool = False,
    bias: bool = True,
    sampled_every: int = 10,
    pairs: bool = True,
) -> "MadeRun":
    """Write a run of so many steps. `layers` have experts (the first is number 1); `mtp` adds layer "mtp0".

    `bias` False leaves the load as skewed as it begins. Steps 1, 1 + `sampled_every`, ... have domains,
    times and (unless `pairs` is False: they are large) pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"num_layers": layers + 1, "num_experts": experts, "top_k": top_k, "num_groups": 1},
        "layout": {"pp": 2, "dp": ranks, "ep": ranks, "microbatches": 4, "schedule": "1f1b"},
        "balance": {"bias": "update" if bias else "none", "sequence_aux": 1e-4},
        "train": {"steps": total_steps},
        "telemetry": {"window": 50},
        "cluster": {"gpus_per_node": max(1, ranks // 2)},
    }
    environment = {
        "packages": {"torch": "2.13.0"},
        "device": "NVIDIA H100",
        "ranks": 2 * ranks,
        "git": {"commit": "0123456789abcdef", "changed_files": 0},
    }
    replace_file(folder / "config.yaml", yaml.safe_dump(config).encode())
    replace_file(folder / "environment.json", json.dumps(environment).encode())
    replace_file(folder / "recipe.txt", b"made\n")
    names: list[int | str] = [*range(1, layers + 1), *(["mtp0"] if mtp else [])]
    run = MadeRun(folder, names, experts, ranks, seed, top_k, tokens, bias, sampled_every, pairs)
    run.advance(steps)
    return run


class MadeRun:
    """A run that can go on: every `advance` appends rows and flushes them step by step."""

    def __init__(
        self,
        folder: Path,
        layers: list[int | str],
        experts: int,
        ranks: int,
        seed: int,
        top_k: int,
        tokens: int,
        has_bias: bool,
        sampled_every: int,
        pairs: bool,
    ) -> None:
        self.folder, self.step = folder, 0
        self._layers, self._experts, self._ranks, self._tokens = layers, experts, ranks, tokens
        self._top_k, self._has_bias, self._sampled_every, self._pairs = top_k, has_bias, sampled_every, pairs
        self._random = np.random.default_rng(seed)
        self._skew = self._random.normal(0, 0.7, (len(layers), experts))
        self._taste = self._random.normal(0, 0.6, (len(DOMAINS), len(layers), experts))
        self._bias = np.zeros((len(layers), experts))
        self._window = LoadWindow(50)

    def advance(self, steps: int) -> None:
        """Append so many steps."""
        for _ in range(steps):
            self.step += 1
            rows = [self._load(number, layer) for number, layer in enumerate(self._layers)]
            for name, new in (("metrics", self._metrics(rows)), ("expert_load", rows)):
                with JsonLines(self.folder / f"{name}.jsonl") as file:
                    for row in new:
                        file.write(row)
            if self.step % self._sampled_every == 1 or self._sampled_every == 1:
                self._write_timeline()

    def alarm(self, message: str = "something", kind: str = "max_vio", **where: int | str | None) -> None:
        """Append an alarm of the last step; `where`: layer, expert, rank."""
        row = {"step": self.step, "kind": kind, "layer": None, "expert": None, "rank": None, **where}
        with JsonLines(self.folder / "alarms.jsonl") as file:
            file.write({**row, "message": message})

    def rewind(self, step: int, ranks: int | None = None) -> None:
        """Go back to a step, as a run that is resumed from its checkpoint, on as many ranks or others."""
        self._ranks = ranks or self._ranks
        for name in ("metrics", "expert_load", "alarms"):
            trim_after(self.folder / f"{name}.jsonl", step)
        self.step = step

    def _metrics(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        step, noise = self.step, self._random.normal(0, 0.03)
        loss = 2.0 + 6.0 * np.exp(-step / 80) + noise
        seconds = 0.5 + 0.1 * self._random.random()
        row = {
            "step": step,
            "tokens": step * self._tokens,
            "loss": loss,
            "mtp_loss": loss + 0.4,
            "lr": 1e-3 * min(1.0, step / 20),
            "grad_norm": 1.0 + abs(noise) * 10,
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds,
            "mfu": None if step % 7 == 0 else 0.4 + noise,
            "max_vio": float(np.mean([row["max_vio"] for row in rows])),
            "aux_loss": 0.01,
            "memory_peak_bytes": 40_000_000_000 + step,
        }
        if step % 20:
            return [row]
        losses = {"all": loss + 0.1, **{name: loss + 0.05 * i for i, name in enumerate(DOMAINS)}}
        return [
            row,
            *(
                {"step": step, "eval_loss": v, "perplexity": float(np.exp(v)), "domain": d}
                for d, v in losses.items()
            ),
        ]

    def _load(self, number: int, layer: int | str) -> dict[str, Any]:
        logits = self._skew[number] + self._bias[number]
        if number == 0 and self.step <= 12:
            logits[[1, self._experts // 2]] = -60.0  # these two begin dead
        sampled = self._step_is_sampled()
        extra = self._choose(number, logits) if sampled else {}
        if sampled:
            counts = np.array(extra.pop("all"))
        else:
            share = np.exp(logits - logits.max())
            counts = self._random.multinomial(self._tokens * self._top_k, share / share.sum())
        if self._has_bias:
            self._bias[number] += 0.03 * np.sign(counts.mean() - counts)
        received = counts.reshape(self._ranks, -1).sum(1)
        rank_rows = np.stack(
            [self._random.multinomial(rows, np.full(self._ranks, 1 / self._ranks)) for rows in received], 1
        )
        self._window.add(layer, counts.tolist())
        violation = max_vio(counts)
        return {
            "step": self.step,
            "layer": layer,
            "counts": counts.tolist(),
            "max_vio": violation,
            "max_vio_window": self._window.max_vio(layer),
            "max_vio_microbatch": violation * 1.3,
            "max_vio_microbatch_max": violation * 1.6,
            "entropy": entropy(counts),
            "dead": dead(counts),
            "collapsing": 0,
            "dropped": 0,
            "gate": np.round(counts / counts.mean(), 4).tolist(),
            "bias": np.round(self._bias[number], 4).tolist(),
            "logit_rms": 1.0 + number / 10,
            "logit_max": 5.0 + number / 10,
            "margin": 0.05,
            "group_limited": 0.0,
            "rank_rows": rank_rows.tolist(),
            "row_bytes": 2 * HIDDEN,
            "links": self._links(rank_rows),
            **extra,
        }

    def _step_is_sampled(self) -> bool:
        return self.step % self._sampled_every == 1 % self._sampled_every

    def _choose(self, number: int, logits: np.ndarray) -> dict[str, Any]:
        """Every token chooses its `top_k` experts: counts of all and by domain, pairs, times."""
        E, T = self._experts, self._tokens
        domain_T = self._random.integers(len(DOMAINS), size=T)
        noise_TE = self._random.gumbel(size=(T, E)).astype(np.float32)
        scores_TE = logits + self._taste[domain_T, number] + noise_TE
        chosen_TK = np.argpartition(-scores_TE, self._top_k - 1, axis=1)[:, : self._top_k]
        one_TE = np.zeros((T, E), dtype=np.float32)
        np.put_along_axis(one_TE, chosen_TK, 1, axis=1)
        counts = one_TE.sum(0).astype(int)
        found: dict[str, Any] = {
            "all": counts,
            "domains": {
                name: one_TE[domain_T == i].sum(0).astype(int).tolist() for i, name in enumerate(DOMAINS)
            },
            "expert_seconds": (1e-6 * counts.reshape(self._ranks, -1).sum(1)).tolist(),
        }
        if self._pairs:
            found["pairs"] = (one_TE.T @ one_TE)[np.triu_indices(E, 1)].astype(int).tolist()
        return found

    def _links(self, rank_rows: np.ndarray) -> list[int]:
        node = np.arange(self._ranks) // max(1, self._ranks // 2)
        own, near = np.eye(self._ranks, dtype=bool), node[:, None] == node
        return [int(rank_rows[where].sum()) for where in (own, near & ~own, ~near)]

    def _write_timeline(self) -> None:
        """Of 1F1B on two pipeline ranks, four microbatches; a backward takes twice a forward."""
        orders = ("F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3")
        ends: dict[tuple[int, str], float] = {}
        spans: list[list[Any]] = []
        waiting = [order.split() for order in orders]
        free = [0.0, 0.0]
        while any(waiting):
            for rank in (0, 1):
                while waiting[rank]:
                    action = waiting[rank][0]
                    needs = (rank - 1, action) if action[0] == "F" else (rank + 1, action)
                    if needs[0] in (0, 1) and needs not in ends:
                        break
                    begin = max(free[rank], ends.get(needs, 0.0))
                    free[rank] = ends[rank, action] = begin + (0.01 if action[0] == "F" else 0.02)
                    spans.append([rank, action, begin, free[rank]])
                    waiting[rank].pop(0)
        content = {"step": self.step, "schedule": "1f1b", "microbatches": 4, "ranks": 2, "spans": spans}
        replace_file(self.folder / "timeline.json", json.dumps(content).encode())
