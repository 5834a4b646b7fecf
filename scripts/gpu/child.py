"""Programs that the check runs: each in a process group of its own, which ends with it, and all that they
print in one log."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TOOK_TOO_LONG = 124
CANNOT_START = 127
# Of what a program said before it failed.
PROBLEM_LINES = 30
# A program that hangs in the driver may outlive its end.
DIES_S = 3.0
# Of what one program prints.
MOST_LOGGED = 200_000


@dataclass
class Ended:
    """What a program printed, and its status: 124 for one that took too long, 127 for a missing one; and
    how long it had printed nothing."""

    text: str
    status: int
    quiet_s: float = 0.0

    def tail(self, count: int = 6) -> str:
        lines = "\n".join(self.text.strip().splitlines()[-count:])
        why = {TOOK_TOO_LONG: "took too long", 0: "ended"}.get(self.status, f"status {self.status}")
        return f"{why}: {lines}" if lines else why

    def json(self) -> dict:
        """The first object that it printed."""
        begin = self.text.find("{")
        if begin < 0:
            raise RuntimeError(self.tail())
        return json.JSONDecoder().raw_decode(self.text[begin:])[0]

    def results(self, marker: str) -> list[dict]:
        """JSON objects behind `marker`, one a line; also of a program that was ended."""
        objects = (line.partition(f"{marker} ")[2] for line in self.text.splitlines())
        return [json.loads(text) for text in objects if text.startswith("{") and text.endswith("}")]

    def result(self, marker: str) -> dict:
        found = self.results(marker)
        if not found:
            raise RuntimeError(self.tail())
        return found[-1]


class Child:
    """A program at work."""

    def __init__(self, children: "Children", arguments: list[str]):
        self.children, self.arguments, self.begun = children, arguments, time.monotonic()
        self.output = tempfile.TemporaryFile()
        self.process, self.ended = None, None
        try:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                cwd=children.root,
                env=children.environment,
                start_new_session=True,
            )
        except OSError as error:
            self.close(CANNOT_START, str(error))

    def is_at_work(self) -> bool:
        return self.ended is None and self.process.poll() is None

    def so_far(self) -> str:
        """What it has printed by now."""
        if self.ended is not None:
            return self.ended.text
        file = self.output.fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def wait(self, seconds: float) -> Ended:
        """Waits so long and no longer: ends it then, with all that it started."""
        if self.ended is None:
            try:
                status = self.process.wait(max(0.0, seconds))
            except subprocess.TimeoutExpired:
                status = TOOK_TOO_LONG
            self.end(status)
        return self.ended

    def end(self, status: int = TOOK_TOO_LONG):
        if self.ended is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # nobody is left of the group
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DIES_S)
            quiet_s = time.time() - os.fstat(self.output.fileno()).st_mtime
            self.output.seek(0)
            self.close(status, self.output.read().decode(errors="replace"), quiet_s)

    def close(self, status: int, text: str, quiet_s: float = 0.0):
        self.output.close()
        self.ended = Ended(text, status, quiet_s)
        seconds = time.monotonic() - self.begun
        self.children.log(f"$ {' '.join(self.arguments)}\n{text[-MOST_LOGGED:]}\n"
                          f"[status {status} after {seconds:.1f} s]\n\n")


class Children:
    """Starts programs in the root of the sources."""

    def __init__(self, root: Path, log_file: Path, environment: dict[str, str]):
        self.root, self.log_file, self.environment = root, log_file, environment
        self.all: list[Child] = []

    def start(self, arguments: list) -> Child:
        child = Child(self, [str(it) for it in arguments])
        self.all.append(child)
        return child

    def run(self, arguments: list, seconds: float) -> Ended:
        return self.start(arguments).wait(seconds)

    def end_all(self):
        for child in self.all:
            with contextlib.suppress(OSError):
                child.wait(0)

    def log(self, text: str):
        try:
            with open(self.log_file, "a") as file:
                file.write(text)
        except OSError as error:  # a full disk is no reason to lose what was found
            print(f"warning: not logged: {error}", flush=True)
