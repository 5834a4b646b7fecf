"""What the check found: a row for each goal, written to JSON and Markdown after every stage."""

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
# Of a cell: whoever wants more has the JSON and the log.
MOST_CHARACTERS = 600
EXIT_STATUS = {MET: 0, MISSED: 1, NOT_MEASURED: 4}


@dataclass
class Row:
    """A goal, or without one a figure beside the goals."""

    title: str
    goal: str
    value: str = "not reached"
    verdict: str = NOT_MEASURED


class Report:
    """Rows in the order of the goals. What was never decided is not measured."""

    def __init__(
        self,
        folder: Path,
        stem: str | None,
        goals: dict[str, tuple[str, str]],
        commit: str,
        partial: bool = False,
    ):
        self.folder, self.stem, self.begun = folder, stem, time.monotonic()
        self.commit = commit
        self.suffix = "-part" if partial else ""
        self.rows = {key: Row(title, goal) for key, (title, goal) in goals.items()}
        self.notes: dict[str, tuple[str, str]] = {}
        self.figures: dict[str, object] = {}
        self.warnings: list[str] = []
        self.card = "unknown card"

    def decide(self, key: str, met: bool, value: str):
        self.rows[key].value, self.rows[key].verdict = value, MET if met else MISSED

    def lose(self, key: str, why: str):
        """Says why a goal is not measured, unless it is decided already."""
        if self.rows[key].verdict == NOT_MEASURED:
            self.rows[key].value = why

    def note(self, title: str, value: str):
        self.notes[title] = (title, value)

    def warn(self, words: str):
        if words not in self.warnings:
            self.warnings.append(words)

    def verdict(self) -> str:
        found = {row.verdict for row in self.rows.values()}
        return next((verdict for verdict in (MISSED, NOT_MEASURED) if verdict in found), MET)

    def summary(self) -> str:
        counts = {verdict: 0 for verdict in (MET, MISSED, NOT_MEASURED)}
        for row in self.rows.values():
            counts[row.verdict] += 1
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        seconds = time.monotonic() - self.begun
        return f"GPU CHECK: {found} in {seconds:.0f} s on {self.card}, commit {self.commit}"

    def table(self) -> str:
        lines = ["| | goal | measured | verdict |", "|---|---|---|---|"]
        lines += [line(row.title, row.goal, row.value, row.verdict) for row in self.rows.values()]
        lines += [line(title, "", value, "") for title, value in self.notes.values()]
        return "\n".join(lines)

    def text(self) -> str:
        return "\n\n".join([self.summary(), *self.warnings, self.table()])

    def files(self) -> list[Path]:
        """JSON and Markdown; some stages alone do not write over those of the whole check."""
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")
        stem = (self.stem or f"gpu-{card}") + self.suffix
        return [self.folder / f"{stem}.{kind}" for kind in ("json", "md")]

    def save(self):
        try:
            self.write()
        except OSError as error:  # the table is printed all the same
            self.warn(f"NOT SAVED: {error}")

    def write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        everything = {"summary": self.summary(), "warnings": self.warnings, "card": self.card}
        everything |= {"commit": self.commit}
        everything |= {"goals": {key: asdict(row) for key, row in self.rows.items()}}
        everything |= {"notes": dict(self.notes.values()), "figures": self.figures}
        machine_readable, readable = self.files()
        replace(machine_readable, json.dumps(everything, indent=1, default=str) + "\n")
        replace(readable, f"# {self.card}\n\n{self.text()}\n")

    def name_card(self, card: str):
        """What was saved before is under another name."""
        self.remove()
        self.card = card

    def remove(self):
        for file in self.files():
            file.unlink(missing_ok=True)


def line(*cells: str) -> str:
    escaped = (" / ".join(cell[:MOST_CHARACTERS].replace("|", "\\|").split("\n")) for cell in cells)
    return f"| {' | '.join(escaped)} |"


def replace(path: Path, text: str):
    """All or nothing: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
