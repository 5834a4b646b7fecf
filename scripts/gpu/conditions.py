"""Clocks, power, heat and load of the card beside the stages, by nvidia-smi, twice a second."""

import shutil
import sys
from pathlib import Path

from .child import Children

FIELDS = "timestamp,clocks.sm,power.draw,temperature.gpu,memory.used,utilization.gpu"
# Between its kernels a card lowers its clocks.
AT_WORK_PERCENT = 50


class Conditions:
    """A file of samples in the order of FIELDS, written meanwhile. Without nvidia-smi there is none."""

    def __init__(self, file: Path):
        self.file = file

    def begin(self, children: Children, stand_in: Path | None):
        command = [sys.executable, "-u", stand_in, "card"] if stand_in else nvidia_smi()
        if command:
            children.start(["sh", "-c", 'exec "$@" >"$0"', self.file, *command])

    def mark(self) -> int:
        """The place of the next sample."""
        try:
            return self.file.stat().st_size
        except OSError:
            return 0

    def since(self, mark: int) -> dict[str, float]:
        """Extremes of the samples from this place on, of those that there are."""
        try:
            lines = self.file.read_bytes()[mark:].decode(errors="replace").splitlines()
        except OSError:
            return {}
        samples = [sample for line in lines if len(sample := numbers(line)) == FIELDS.count(",")]
        clocks = [it[0] for it in samples if it[4] is None or it[4] >= AT_WORK_PERCENT]
        watts, heat, mib, load = ([it[at] for it in samples] for at in (1, 2, 3, 4))
        found = {
            "least_sm_mhz": extreme(min, clocks),
            "most_watts": extreme(max, watts),
            "most_celsius": extreme(max, heat),
            "most_mib": extreme(max, mib),
            "most_percent": extreme(max, load),
        }
        return {name: value for name, value in found.items() if value is not None}


def nvidia_smi() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = [f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    # Each line as it comes, also where the output is a file.
    unbuffered = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []
    return [*unbuffered, "nvidia-smi", "--id=0", *query, "-lms", "500"]


def numbers(line: str) -> list[float | None]:
    """The fields behind the timestamp; none for what a card does not tell."""
    return [number(field) for field in line.split(",")[1:]]


def number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def extreme(choose, values: list[float | None]) -> float | None:
    return choose((value for value in values if value is not None), default=None)


def in_words(stages: dict[str, dict]) -> str:
    signs = [("least_sm_mhz", "≥", "MHz"), ("most_watts", "≤", "W"), ("most_celsius", "≤", "°C")]

    def of_stage(found: dict) -> str:
        return ", ".join(f"{sign} {found[key]:,.0f} {unit}" for key, sign, unit in signs if key in found)

    return "; ".join(f"{name} {of_stage(found)}" for name, found in stages.items())
