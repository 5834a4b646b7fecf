"""The check where there is no card: a tiny model, the emulated driver for doctor and a run, stand-ins for
PyTorch and the peer, and stages that go wrong. Its figures mean nothing."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from .check import Check, packed_commit
from .goals import GOALS
from .report import MET, NOT_MEASURED, Report
from .setup import REHEARSAL
from .stages import STAGES, Stage, chosen, decided_by

# Stages that show something without a card, too.
MEANINGFUL = ("doctor", "kernel tests", "backend tests", "smoke", "curve", "32B", "8B long")
# What cannot be had.
MISSING = ("sanitizer",)
# Of rehearsed.py's samples.
CLOCKS = {"least_sm_mhz": 1500, "most_celsius": 41, "most_mib": 2000, "most_percent": 100}
PARTIAL, LEFT_BEHIND = "begun", "left behind"


class Rehearsal:
    """A check, and what went otherwise than it should."""

    def __enter__(self) -> "Rehearsal":
        self.out = Path(tempfile.mkdtemp(prefix="gpu_rehearsal-"))
        wrong = {"hangs": (1, self.hang), "raises": (5, self.fail), "no disk": (5, self.lose_disk)}
        self.stages = STAGES + [Stage(name, *it) for name, it in wrong.items()]
        self.stages += [Stage("a disk again", 5, self.find_disk)]
        report = Report(self.out, "gpu_check", decided_by(STAGES), packed_commit())
        self.check = Check(REHEARSAL, self.stages, report, self.out / "gpu_check.log")
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.out, ignore_errors=True)

    def hang(self, check: Check):
        """What a program printed is there when it is ended, and what it started is gone."""
        pid_file = self.out / "pid"
        script = f"sleep 60 & echo $! >{pid_file}; echo {PARTIAL}; wait"
        ended = check.run(["sh", "-c", script])
        raise RuntimeError(f"{ended.text.strip()} {ended.status} {self.is_alive(int(pid_file.read_text()))}")

    def is_alive(self, pid: int) -> str:
        time.sleep(0.1)
        stat = Path(f"/proc/{pid}/stat")
        alive = stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
        return LEFT_BEHIND if alive else "gone"

    def fail(self, check: Check):
        saved = json.loads(check.report.files()[0].read_text())
        raise RuntimeError(f"after {saved['notes']['stage hangs']} | it goes on")

    def lose_disk(self, check: Check):
        """Neither the report nor the log can be written."""
        self.log = check.children.log_file
        check.report.folder = check.children.log_file = Path("/dev/full")
        check.run(["true"])

    def find_disk(self, check: Check):
        check.report.folder, check.children.log_file = self.out, self.log

    def judge(self, status: int) -> int:
        problems = self.problems(status)
        for problem in problems:
            print(f"problem: {problem}")
        if problems:
            print((self.out / "gpu_check.log").read_text()[-20_000:])
        print(f"REHEARSAL, NOT A GPU RESULT: {'FAILED' if problems else 'passed'}")
        return 1 if problems else 0

    def problems(self, status: int) -> list[str]:
        saved = json.loads((self.out / "gpu_check.json").read_text())
        goals = saved["goals"]
        problems = [
            f"{key}: {row['verdict']}: {row['value']}"
            for key, row in goals.items()
            if (row["verdict"] == NOT_MEASURED) != (key in MISSING)
            or (key in MEANINGFUL and row["verdict"] != MET)
        ]
        hung = saved["notes"].get("stage hangs")
        if hung != f"{PARTIAL} 124 gone":
            problems.append(f"the stage that hangs: {hung}")
        if saved["notes"].get("stage raises") != f"after {hung} | it goes on":
            problems.append(f"the stage that raises: {saved['notes'].get('stage raises')}")
        if not any(words.startswith("NOT SAVED") for words in saved["warnings"]):
            problems.append(f"the stage without a disk: {saved['warnings']}")
        clocks = saved["figures"].get("conditions", {}).get("speed")
        if clocks != CLOCKS:
            problems.append(f"clocks beside `speed`: {clocks}")
        if "\\| it goes on" not in (self.out / "gpu_check.md").read_text():
            problems.append("a cell has a bar")
        if set(goals) != set(GOALS):
            problems.append(f"goals that no stage decides: {set(GOALS) - set(goals)}")
        part = [stage.name for stage in chosen(["smoke"])]
        if part != ["begin", "doctor", "machine", "curve", "smoke"]:
            problems.append(f"the stages for `smoke`: {part}")
        # Stand-ins reach no goal.
        if status != 1:
            problems.append(f"status {status}")
        if len(os.listdir(self.out)) > 8:
            problems.append(f"too many files: {os.listdir(self.out)}")
        return problems
