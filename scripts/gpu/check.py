"""What all stages share: the report, the programs, the models that are written meanwhile, and the time."""

import ctypes
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from .child import Child, Children, Ended
from .conditions import Conditions
from .nibble import Run
from .report import Report
from .setup import Setup

ROOT = Path(__file__).resolve().parent.parent.parent
CARRIED = ROOT / "gpu_check"
SCRIPTS = ROOT / "scripts"
# What the models of a check on a card take, and as much again.
ROOMY_BYTES = 40 << 30


class NoCard(Exception):
    """There is nothing to be checked."""


class Check:
    """One call of the script."""

    def __init__(self, setup: Setup, stages: list, report: Report, log: Path):
        self.setup, self.begun, self.report = setup, time.monotonic(), report
        self.names = {stage.name for stage in stages}
        self.models = {name for stage in stages for name in stage.models}
        self.folder = Path(tempfile.mkdtemp(prefix="gpu_check-"))
        self.shared = self.roomy_folder()
        (self.shared / "runs").mkdir()
        log.parent.mkdir(parents=True, exist_ok=True)
        self.conditions = Conditions(log.with_suffix(".csv"))
        for old in (log, self.conditions.file):
            old.unlink(missing_ok=True)
        self.children = Children(ROOT, log, self.environment())
        self.stage_end = self.begun + setup.deadline_s
        self.background: dict[str, Child] = {}
        self.runs: dict[str, Run] = {}

    def roomy_folder(self) -> Path:
        """Where large models are: memory, if there is much of it."""
        memory = Path("/dev/shm")
        if self.setup.rehearsal or not memory.is_dir() or shutil.disk_usage(memory).free < ROOMY_BYTES:
            return self.folder
        return Path(tempfile.mkdtemp(prefix="gpu_check-", dir=memory))

    def environment(self) -> dict[str, str]:
        # Whether the driver makes it is not documented, and without it each program compiles the kernels anew.
        cache = self.folder / "cuda-cache"
        cache.mkdir(exist_ok=True)
        own = {"CUDA_CACHE_PATH": str(cache), "RUST_BACKTRACE": "0"}
        if importlib.util.find_spec("bitsandbytes") is None:
            packages = [str(CARRIED / "site"), os.environ.get("PYTHONPATH", "")]
            own |= {"PYTHONPATH": os.pathsep.join(filter(None, packages))}
        own |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder)}
        if self.setup.device == "cuda":
            own["NIBBLE_TEST_DEVICE"] = "cuda"
        environment = {"HOME": str(self.folder)} | os.environ | own
        libraries = cuda_libraries()
        if libraries and "NIBBLE_CUDA_LIB_DIR" not in environment:
            environment["NIBBLE_CUDA_LIB_DIR"] = libraries
        return environment

    def rate(self, name: str) -> float | None:
        """What the card itself does, where the stage `rates` has found it."""
        return self.report.figures.get("rates", {}).get(name)

    def left(self) -> float:
        return self.begun + self.setup.deadline_s - time.monotonic()

    def stage_left(self) -> float:
        return self.stage_end - time.monotonic()

    def run(self, arguments: list, keep_s: float = 0.0) -> Ended:
        """A program that may take what is left to the stage but so many seconds."""
        return self.children.run(arguments, self.stage_left() - keep_s)

    def python(self, name: str, *arguments) -> Ended:
        """One of the scripts of this folder."""
        return self.run([sys.executable, SCRIPTS / "gpu" / name, *arguments])

    def start(self, name: str, arguments: list):
        """A program beside the stages, until it is awaited."""
        self.background[name] = self.children.start(arguments)

    def awaited(self, name: str) -> Ended:
        ended = self.background[name].wait(self.stage_left())
        if ended.status:
            raise RuntimeError(f"{name}: {ended.tail()}")
        return ended

    def make_model(self, name: str, preset: str, folder: Path):
        maker = [sys.executable, SCRIPTS / "make_checkpoint.py", folder / name]
        self.start(name, maker + ["--preset", preset, "--nf4"])

    def model(self, name: str) -> Path:
        """A model that was written meanwhile."""
        self.awaited(name)
        return Path(self.background[name].arguments[2])

    def config(self, name: str) -> dict:
        return json.loads((self.model(name) / "config.json").read_text())

    def train(self, name: str, model: Path, rows: Path, length: int, *flags, **options) -> Run:
        """A run of `nibble train` under the budget, which is part of the account."""
        ended = self.run(self.train_arguments(name, model, rows, length, *flags, **options))
        self.runs[name] = Run.read(self.out(name), ended)
        for checkpoint in self.out(name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return self.runs[name]

    def out(self, name: str) -> Path:
        """The output folder of a run."""
        return self.shared / "runs" / name

    def train_arguments(
        self, name: str, model: Path, rows: Path, length: int, *flags, device: str | None = None
    ) -> list:
        arguments = [CARRIED / "nibble", "train", "--model", model, "--data", rows]
        arguments += ["--out", self.out(name), "--device", device or self.setup.device]
        arguments += ["--max-length", length, "--gradient-accumulation-steps", 1, "--logging-steps", 1]
        return arguments + ["--lora-r", 16, "--lora-dropout", 0, *flags]

    def write_rows(self, name: str, count: int, length: int, vocabulary: int) -> Path:
        """Rows of random tokens, the same for everybody; short ones are the beginnings of long ones."""

        def row(number: int) -> list[int]:
            source = random.Random(f"{name} {number}")
            return [source.randrange(3, vocabulary) for _ in range(length)]

        path = self.folder / f"{name}.jsonl"
        write_jsonl(path, map(row, range(count)))
        return path

    def close(self):
        self.children.end_all()
        for folder in {self.folder, self.shared}:
            shutil.rmtree(folder, ignore_errors=True)


def write_jsonl(path: Path, rows):
    with open(path, "w") as file:
        for ids in rows:
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def packed_commit() -> str:
    """Of the sources of the carried programs, with a + where they were changed."""
    sources = CARRIED / "sources"
    return sources.read_text().split()[-1] if sources.exists() else "unknown"


def host_kib(field: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def require_driver():
    """The program says more of it, but a moment later."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NoCard(f"no NVIDIA driver: {error}") from error


def cuda_libraries() -> str | None:
    """The folder of cuBLAS in Python's packages, which the program would otherwise search each time."""
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations if found else []:
        for library in sorted(Path(place).glob("*/lib/libcublas.so.1[23]")):
            return str(library.parent)
    return None


def end_with_table(*_):
    """The handler of signals: whoever asks for the end gets the table."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
