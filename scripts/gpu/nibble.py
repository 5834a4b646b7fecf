"""Runs of `nibble train`, and what their logs say."""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from .child import Ended

GIB = 1 << 30


@dataclass
class Run:
    """A training run, finished or not."""

    ended: Ended
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int = 0
    planned_bytes: int = 0
    finished: bool = False
    out_of_memory: str = ""
    kept: tuple[int, int] | None = None

    @staticmethod
    def read(out: Path, ended: Ended) -> "Run":
        run = Run(ended)
        log = out / "metrics.jsonl"
        for text in log.read_text().splitlines() if log.exists() else []:
            run.take(json.loads(text))
        kept = re.search(r"(\d+) of (\d+) blocks keep their activations", ended.text)
        run.kept = (int(kept.group(1)), int(kept.group(2))) if kept else None
        return run

    def take(self, event: dict):
        if event["event"] == "start":
            self.planned_bytes = sum(planned for _, planned in event["memory_plan"])
        elif event["event"] == "step":
            # One that is not finite is written as none.
            self.losses.append(math.nan if event["loss"] is None else event["loss"])
            self.rates.append(event["tokens_per_second"])
            self.tokens = event["num_input_tokens_seen"] // event["step"]
            self.peak_bytes = max(self.peak_bytes, event.get("gpu_bytes") or event["rss_bytes"])
        elif event["event"] == "out_of_memory":
            self.out_of_memory = event["reason"]
        elif event["event"] == "end":
            self.finished = event["reason"] == "finished"
            memory = event.get("memory") or {}
            self.peak_bytes = max(self.peak_bytes, memory.get("peak_bytes") or 0)
            # A plan that was made anew, too.
            rows = memory.get("rows", [])
            self.planned_bytes = sum(row["planned_bytes"] for row in rows) or self.planned_bytes

    def check(self) -> "Run":
        """Itself, or why it is no use."""
        if self.out_of_memory:
            raise RuntimeError(f"memory ran short: {self.out_of_memory}")
        if not self.finished:
            raise RuntimeError(f"{len(self.losses)} steps; {self.ended.tail()}")
        return self

    def tokens_per_second(self, warm_up: int) -> float:
        measured = self.rates[warm_up:]
        if not measured:
            raise RuntimeError(f"only {len(self.rates)} steps, of which {warm_up} warm up")
        return statistics.median(measured)

    def plan_error(self) -> float:
        return abs(self.peak_bytes / self.planned_bytes - 1)

    def in_words(self) -> str:
        kept = f", {self.kept[0]} of {self.kept[1]} blocks kept" if self.kept else ""
        peak, planned = self.peak_bytes / GIB, self.planned_bytes / GIB
        return f"peak {peak:.2f} GiB, planned {planned:.2f}{kept}; first loss {self.losses[0]:.3f}"


def step_flops(config: dict, length: int, kept: int, rank: int = 16) -> float:
    """Floating-point operations for a token of a document of so many: docs/maths.md, "Work"; all tokens
    are trained, and blocks that do not keep their activations are computed twice."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    weights = layers * sum(rows * columns for rows, columns in shapes)
    adapters = layers * rank * sum(rows + columns for rows, columns in shapes)
    attention = layers * hidden * length
    again = 1 - kept / layers
    return (
        (4 + 2 * again) * weights
        + 4 * config["vocab_size"] * hidden
        + (6 + 2 * again) * adapters
        + (7 + 2 * again) * attention
    )
