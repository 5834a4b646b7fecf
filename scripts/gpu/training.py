"""Stages that train models of 8B and 32B: their speed, their memory beside the plan, and the longest rows."""

import math
import shutil
import sys
import time
from pathlib import Path

from . import goals
from .check import SCRIPTS, Check, host_kib
from .child import TOOK_TOO_LONG
from .nibble import GIB, Run, step_flops

# ---------------------------------------------------------------- speed


def rows_8b(check: Check, length: int) -> Path:
    return check.write_rows("rows", check.setup.steps, length, check.config("8B")["vocab_size"])


def train_8b(check: Check, activations: str, length: int | None = None) -> Run:
    setup, length = check.setup, length or check.setup.length
    name = f"8B {activations}" + ("" if length == setup.length else f", {length} tokens")
    # Attention of random weights learns too slowly for the checks of the first steps.
    flags = ["--max-steps", setup.steps, "--activations", activations, "--self-checks", "false"]
    flags += ["--memory-budget", setup.budget, "--learning-rate", "1e-4", "--shuffle", "false"]
    if activations == "checkpoint":
        # As little memory as the peer's way takes, at the same policy.
        flags += ["--dequantized-blocks", "0"]
    device = setup.device_checkpoint if activations == "checkpoint" else setup.device
    run = check.train(name, check.model("8B"), rows_8b(check, length), length, *flags, device=device)
    check.report.figures.setdefault("losses", {})[name] = run.losses
    judge_plan(check)
    speed = run.check().tokens_per_second(setup.warm_up)
    check.report.note(f"Nibble, {name}", f"{speed:,.0f} tokens/s; {run.in_words()}")
    return run


def checkpoint_8b(check: Check):
    achieved = tflops(check, train_8b(check, "checkpoint"))
    cublas = check.rate("cublas_tflops")
    if cublas is None:
        return check.report.lose("utilisation", f"{achieved:.0f} TFLOP/s; cuBLAS has no figure")
    words = f"{achieved / cublas:.0%}: {achieved:.0f} TFLOP/s, cuBLAS {cublas:.0f}"
    check.report.decide("utilisation", achieved / cublas >= goals.UTILISATION, words)


def auto_8b(check: Check):
    achieved = tflops(check, train_8b(check, "auto"))
    check.report.note("Nibble, 8B auto, operations", f"{achieved:.0f} TFLOP/s")


def tflops(check: Check, run: Run) -> float:
    kept = run.kept[0] if run.kept else 0
    flops = step_flops(check.config("8B"), check.setup.length, kept)
    return flops * run.tokens_per_second(check.setup.warm_up) / 1e12


def half_8b(check: Check):
    """Beside the peer's figures for rows of half the length, if it has any."""
    half = check.setup.length // 2
    if all(way["tokens"] != half for way in check.report.figures.get("peer", [])):
        raise RuntimeError("not run: the peer has no figure for it")
    train_8b(check, "auto", half)


def judge_plan(check: Check):
    """The worst of the runs so far, each of which had the card to itself."""
    short = [name for name, run in check.runs.items() if run.out_of_memory]
    if short:
        check.report.decide("plan", False, f"memory ran short: {', '.join(short)}")
        return
    errors = [(run.plan_error(), name) for name, run in check.runs.items() if run.finished]
    if errors:
        error, name = max(errors)
        words = f"{error:.2%} off in {name}, {len(errors)} runs"
        check.report.decide("plan", error <= goals.PLAN_ERROR, words)


# ---------------------------------------------------------------- size


def size_run(check: Check, name: str, length: int, steps: int, *more: str) -> list:
    """Model, rows, length and flags of a run within the budget."""
    rows = check.write_rows(f"rows of {name}", steps, length, check.config(name)["vocab_size"])
    flags = ["--max-steps", steps, "--memory-budget", check.setup.budget, "--self-checks", "false", *more]
    return [check.model(name), rows, length, *flags]


def judge_size(check: Check, goal: str, run: Run, length: int, alone: bool):
    """Whether it trains at all, within the budget. Its peak is that of the card, which others may share."""
    if run.losses:
        words = f"{len(run.losses)} steps, {run.rates[-1]:,.0f} tokens/s; {run.in_words()}"
        budget = parse_gib(check.setup.budget)
        trains = not run.out_of_memory and run.tokens == length and all(map(math.isfinite, run.losses))
        trains &= run.planned_bytes <= budget
        fits = run.peak_bytes <= budget * goals.PEAK_BESIDE_BUDGET
        if trains and not fits and not alone:
            return check.report.lose(goal, f"{words}; the peak has other programs' memory")
        check.report.decide(goal, trains and fits, words)
    elif run.out_of_memory or run.ended.status not in (0, TOOK_TOO_LONG):
        check.report.decide(goal, False, run.out_of_memory or run.ended.tail())
    else:
        raise RuntimeError(run.ended.tail())


def parse_gib(size: str) -> float:
    return float(size.removesuffix("GiB")) * GIB


def begin_32b(check: Check):
    """Its writer, once nothing is timed any more."""
    needed, free = check.setup.bytes_32b, shutil.disk_usage(check.shared).free
    if free < needed:
        words = f"{free / GIB:.1f} GiB are free in {check.shared}"
        raise RuntimeError(f"{words}, the model takes {needed / GIB:.1f}")
    check.make_model("32B", check.setup.preset_32b, check.shared)


def train_32b(check: Check):
    if "32B" not in check.background:
        return  # its beginning has said why
    length = check.setup.length_32b
    run = check.train("32B", *size_run(check, "32B", length, 3))
    shutil.rmtree(check.model("32B"), ignore_errors=True)
    judge_plan(check)
    judge_size(check, "32B", run, length, alone=True)


def free_gib() -> float:
    return host_kib("MemAvailable") / 2**20


def touch_memory(check: Check):
    """A virtual machine may be given its memory as it is used, and tell of less until then."""
    if "8B long" in check.names and not check.setup.rehearsal and free_gib() < 2 * goals.LONG_PINS_GIB:
        check.start("memory", [sys.executable, SCRIPTS / "gpu" / "touch_memory.py", 2 * goals.LONG_PINS_GIB])


def require_pinnable_memory(check: Check):
    if "memory" in check.background:
        check.background["memory"].wait(0)
    if (free := free_gib()) < 2 * goals.LONG_PINS_GIB:
        words = f"{free:.0f} GiB of the host's memory are free, half of it may be pinned"
        raise RuntimeError(f"{words}; {goals.LONG_PINS_GIB} GiB are needed")


def seconds_of_32b(check: Check) -> float:
    """What is kept for the stage that comes after the long run."""
    return check.setup.need_32b_s if "32B" in check.background else 0.0


def begin_long(check: Check):
    """Its one step takes minutes: it runs beside the stages that measure neither time nor memory."""
    left, needed = check.left() - seconds_of_32b(check), check.setup.need_long_s
    if left < needed:
        raise RuntimeError(f"{max(left, 0):.0f} s were left for it, a step takes {needed:.0f}")
    if not check.setup.rehearsal:
        require_pinnable_memory(check)
    # The leanest way: `auto` would fill the budget to save time.
    lean = ["--activations", "offload", "--dequantized-blocks", "0"]
    run = size_run(check, "8B", check.setup.length_long, 1, *lean)
    check.start("8B long", check.train_arguments("8B long", *run))
    # Other programs' memory is a part of a plan: nobody else is on the card until it is made.
    child = check.background["8B long"]
    while child.is_at_work() and "plan: " not in child.so_far() and check.stage_left() > 0:
        time.sleep(0.1)


def train_long(check: Check):
    if "8B long" not in check.background:
        return  # its beginning has said why
    ended = check.background["8B long"].wait(check.stage_left() - seconds_of_32b(check))
    run = Run.read(check.out("8B long"), ended)
    judge_size(check, "8B long", run, check.setup.length_long, alone=False)
