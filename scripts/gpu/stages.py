"""The stages, in order: what each needs, what it decides, what it does."""

import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import goals
from .beside_peer import peer
from .card_tests import backend_tests, begin_kernel_tests, kernel_tests, sanitizer
from .check import CARRIED, SCRIPTS, Check, NoCard, host_kib, require_driver, write_jsonl
from .child import PROBLEM_LINES, TOOK_TOO_LONG, Ended
from .nibble import Run
from .training import auto_8b, begin_32b, begin_long, checkpoint_8b, half_8b, touch_memory, train_32b, train_long

# Kernels of a step that the table names; the figures have all.
PROFILE_PARTS = 12


@dataclass
class Stage:
    """A part of the check, which may take `need_s` seconds, or what is left."""

    name: str
    need_s: float
    action: Callable[[Check], None]
    decides: tuple[str, ...] = ()
    # Stages whose results it uses, and models that are written meanwhile.
    after: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    # What shows why all else fails; they come first then.
    diagnosis: bool = False
    # It measures time: what the card's clocks were meanwhile is part of the result.
    timed: bool = False


# ---------------------------------------------------------------- machine


def begin(check: Check):
    """What takes its time beside the first stages: imports, models, the CPU's curve."""
    require_driver()
    setup = check.setup
    imports = "import torch, transformers, peft, bitsandbytes"
    check.start("imports", [sys.executable, "-c", "pass" if setup.rehearsal else imports])
    places = {
        "curve model": (setup.curve_preset, check.folder),
        "8B": (setup.preset_8b, check.shared),
    }
    for name, place in places.items():
        if name in check.models:
            check.make_model(name, *place)
    touch_memory(check)
    if "curve model" in check.models:
        write_curve_rows(check)
        model = check.model("curve model")
        check.start("curve on the CPU", curve_arguments(check, model, "curve-cpu", "cpu"))


def doctor(check: Check):
    ended = check.run([CARRIED / "nibble", "doctor", "--json"])
    try:
        found = ended.json()
    except (RuntimeError, ValueError):
        check.report.decide("doctor", False, ended.tail())
        raise
    check.report.figures["doctor"] = found
    obstacle, devices = found["cuda"]["obstacle"], found["cuda"]["driver"].get("devices")
    if not devices:
        raise NoCard(obstacle)
    check.report.name_card(devices[0]["name"])
    check.report.decide("doctor", not obstacle, obstacle or devices[0]["name"])
    if obstacle:
        check.report.warnings.append(f"THE RESULTS OF THIS CARD ARE WRONG: {obstacle}")
        check.children.environment["NIBBLE_UNVERIFIED_GPU"] = "1"
        raise RuntimeError(obstacle)


def machine(check: Check):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    check.report.note("card, driver, memory", check.run(query).text.strip())
    spaces = {str(path): shutil.disk_usage(path).free for path in (check.folder, check.shared)}
    memory = {field: host_kib(field) for field in ("MemTotal", "MemAvailable")}
    figures = {"processors": os.cpu_count(), "load": os.getloadavg(), "memory_kib": memory}
    check.report.figures["machine"] = figures | {"free_bytes": spaces}
    check.conditions.begin(check.children, SCRIPTS / "gpu/rehearsed.py" if check.setup.rehearsal else None)


# ---------------------------------------------------------------- kernels


def rates(check: Check):
    """The card's own."""
    if check.setup.rehearsal:
        ended = check.python("rehearsed.py", "rates")
    else:
        ended = check.python("torch_rates.py", check.setup.length)
    found = {key: value for rate in ended.results("RATE") for key, value in rate.items()}
    check.report.figures["rates"] = found
    if len(found) < 3:
        raise RuntimeError(ended.tail(PROBLEM_LINES))


def speed(check: Check):
    arguments = ["--test-threads", "1", "--nocapture", "speed::"]
    ended = check.run([CARRIED / "cuda_backend", *arguments])
    found = {marker: ended.results(marker) for marker in ("SPEED", "EXPOSED", "PROFILE")}
    check.report.figures["kernels"] = found
    if found["PROFILE"]:
        note_profile(check, found["PROFILE"][0])
    for judge, marker in [(judge_exposed, "EXPOSED"), (judge_dequantizing, "SPEED"), (judge_attention, "SPEED")]:
        if found[marker]:
            judge(check, found[marker][0])
    if not all(found.values()):
        raise RuntimeError(ended.tail(PROBLEM_LINES))


def note_profile(check: Check, found: dict):
    parts = found["parts"]
    together = sum(ms for _, _, ms in parts)
    words = ", ".join(f"{name} {ms / together:.1%}" for name, _, ms in parts[:PROFILE_PARTS])
    check.report.note("kernels and products of a step, each by itself", f"{together:.1f} ms: {words}")


def judge_dequantizing(check: Check, found: dict):
    dequantized, copied = found["dequantize_gb_per_s"], found["copy_gb_per_s"]
    fastest = max(copied, check.rate("copy_gb_per_s") or 0.0)
    share = dequantized / fastest
    words = f"{share:.0%}: {dequantized:,.0f} GB/s, a copy {fastest:,.0f}"
    check.report.decide("dequantize", share >= goals.DEQUANTIZE_SHARE, words)
    row = found["row_gb_per_s"]
    check.report.note("a row times 4-bit weights, beside a copy", f"{row / fastest:.0%}: {row:,.0f} GB/s")


def judge_exposed(check: Check, found: dict):
    held = f"{found['held_ms']:.1f} ms where all weights stay dequantized"
    words = f"{found['exposed']:.1%} of {found['step_ms']:.1f} ms, four blocks; {held}"
    check.report.decide("exposed", found["exposed"] <= goals.EXPOSED_SHARE, words)


def judge_attention(check: Check, found: dict):
    own, torch = found["attention_ms"], check.rate("attention_ms")
    if torch is None:
        return check.report.lose("attention", f"{own:.2f} ms; PyTorch has no figure")
    words = f"{torch / own:.0%}: {own:.2f} ms, PyTorch {torch:.2f} ms, {found['attention_tokens']} tokens"
    check.report.decide("attention", torch / own >= goals.ATTENTION_SHARE, words)


def gradients(check: Check):
    test = "gradients::of_blocks_of_an_8b_model_match_the_cpu"
    ended = check.run([CARRIED / "cuda_backend", "--test-threads", "1", "--exact", "--nocapture", test])
    found = ended.result("GRADIENTS")
    check.report.figures["gradients"] = found
    if None in (found["largest"], found["mean"]):
        return check.report.decide("gradients", False, f"{found['worst']} is not finite")
    words = f"{found['largest']:.2%} in {found['worst']}, mean {found['mean']:.2%}, {found['tokens']} tokens"
    check.report.decide("gradients", found["largest"] <= goals.GRADIENT_ERROR, words)


# ---------------------------------------------------------------- curve and program


def write_curve_rows(check: Check):
    """Four rules for the next token, which are learned."""
    length, rows = check.setup.curve_length, 64
    first = ((37 * row) % 101 for row in range(rows))
    write_jsonl(
        check.folder / "curve.jsonl",
        ([3 + (start + (2 + row % 4) * at) % 97 for at in range(length)] for row, start in enumerate(first)),
    )


def curve_arguments(check: Check, model: Path, name: str, device: str) -> list:
    setup = check.setup
    flags = ["--max-steps", setup.curve_steps, "--learning-rate", setup.curve_learning_rate]
    flags += ["--per-device-train-batch-size", 4]
    # What the resumed run of `smoke` has left.
    flags += ["--save-steps", setup.curve_steps - 5, "--threads", max(1, (os.cpu_count() or 2) // 2)]
    rows, length = check.folder / "curve.jsonl", setup.curve_length
    return check.train_arguments(name, model, rows, length, *flags, device=device)


def curve(check: Check):
    model = check.model("curve model")
    ended = check.run(curve_arguments(check, model, "curve-card", check.setup.device))
    card = Run.read(check.out("curve-card"), ended).check()
    cpu = Run.read(check.out("curve-cpu"), check.awaited("curve on the CPU")).check()
    differences = [abs(a / b - 1) for a, b in zip(card.losses, cpu.losses, strict=True)]
    mean, largest = sum(differences) / len(differences), max(differences)
    check.report.figures["curve"] = {"card": card.losses, "cpu": cpu.losses}
    words = f"{mean:.3%}, at most {largest:.3%}, {len(differences)} steps"
    words += f"; loss {cpu.losses[0]:.3f} to {cpu.losses[-1]:.3f}"
    falls = max(card.losses[-1], cpu.losses[-1]) < 0.98 * card.losses[0]
    words += "" if falls else ": DOES NOT FALL"
    check.report.decide("curve", falls and mean <= goals.LOSS_GAP, words)


def smoke(check: Check):
    """The program's other commands, and a run that is resumed bit for bit, with the curve's adapter."""
    run, model = check.out("curve-card"), check.model("curve model")
    nibble, place = CARRIED / "nibble", ["--device", check.setup.device]
    of_model = ["--model", model, "--adapter", run]
    adapter = run / "adapter_model.safetensors"
    before = adapter.read_bytes()
    shutil.rmtree(run / f"checkpoint-{check.setup.curve_steps}")
    rows = ["--data", check.folder / "curve.jsonl", "--max-length", check.setup.curve_length, "--json"]
    commands = {
        "resume": ["train", "--out", run, "--resume"],
        "eval": ["eval", *of_model, *place, *rows],
        "eval on the CPU": ["eval", *of_model, "--device", "cpu", *rows],
        "generate": ["generate", *of_model, *place, "--raw", "--prompt", "w5 w7 w9", "--max-new-tokens", 8],
    }
    ended = {name: check.run([nibble, *arguments]) for name, arguments in commands.items()}
    late = [name for name, it in ended.items() if it.status == TOOK_TOO_LONG]
    if late:
        raise RuntimeError(f"{', '.join(late)} took too long")
    problems = [f"{name}: {it.tail()}" for name, it in ended.items() if it.status or not it.text.strip()]
    if adapter.read_bytes() != before:
        problems.append("a resumed run has another adapter")
    if problems:
        return check.report.decide("smoke", False, "; ".join(problems))
    gaps = loss_gaps(ended["eval"], ended["eval on the CPU"])
    words = "resumed bit for bit; eval off the CPU's: " + ", ".join(f"{gap:.3%}" for gap in gaps)
    check.report.decide("smoke", all(gap <= goals.LOSS_GAP for gap in gaps), words)


def loss_gaps(one: Ended, other: Ended) -> list[float]:
    """Of base and adapter. A loss that is not finite is written as none."""
    found, expected = one.json(), other.json()
    losses = ([it[model]["loss"] or math.nan for it in (found, expected)] for model in ("base", "adapter"))
    return [abs(a / b - 1) for a, b in losses]


CURVE, B8 = ("curve model",), ("8B",)
STAGES = [
    Stage("begin", 60, begin),
    Stage("doctor", 120, doctor, ("doctor",)),
    Stage("machine", 15, machine),
    Stage("rates", 100, rates, timed=True),
    Stage("speed", 60, speed, ("dequantize", "exposed", "attention"), after=("rates",), timed=True),
    Stage(
        "8B checkpoint",
        70,
        checkpoint_8b,
        ("utilisation", "plan"),
        after=("rates",),
        models=B8,
        timed=True,
    ),
    Stage("8B auto", 60, auto_8b, ("plan",), models=B8, timed=True),
    Stage(
        "peer",
        120,
        peer,
        ("speed checkpoint", "speed auto", "peak", "first loss"),
        after=("8B checkpoint", "8B auto"),
        models=B8,
        timed=True,
    ),
    Stage("8B of half length", 40, half_8b, after=("peer",), models=B8, timed=True),
    # From here on nothing is timed, and what takes long runs beside.
    Stage("begin 32B", 15, begin_32b, ("32B",)),
    Stage("begin 8B long", 45, begin_long, ("8B long",), models=B8),
    Stage("begin kernel tests", 15, begin_kernel_tests, diagnosis=True),
    Stage("gradients", 60, gradients, ("gradients",), diagnosis=True),
    Stage("curve", 60, curve, ("curve",), models=CURVE),
    Stage("smoke", 60, smoke, ("smoke",), after=("curve",), models=CURVE),
    Stage(
        "kernel tests", 80, kernel_tests, ("kernel tests",), after=("begin kernel tests",), diagnosis=True
    ),
    Stage("backend tests", 80, backend_tests, ("backend tests",), diagnosis=True),
    Stage("sanitizer", 60, sanitizer, ("sanitizer",)),
    Stage("8B long", 400, train_long, ("8B long",), after=("begin 8B long",), models=B8),
    # Its memory is held against its plan: by now the card is its own.
    Stage("32B", 100, train_32b, ("32B", "plan"), after=("begin 32B",)),
]
# They come before all others.
ALWAYS = ("begin", "doctor", "machine")
# Whoever fails here has little use for the rest.
TELLING = ("doctor", "8B checkpoint")


def chosen(names: list[str]) -> list[Stage]:
    """The stages of these names, and those that they come after; all without names."""
    by_name = {stage.name: stage for stage in STAGES}
    if not names:
        return STAGES
    unknown = [name for name in names if name not in by_name]
    if unknown:
        known = ", ".join(f"`{name}`" for name in by_name)
        raise ValueError(f"no stage `{unknown[0]}`; there are {known}")
    wanted, left = set(ALWAYS), list(names)
    while left:
        name = left.pop()
        wanted.add(name)
        left.extend(by_name[name].after)
    return [stage for stage in STAGES if stage.name in wanted]


def decided_by(stages: list[Stage]) -> dict[str, tuple[str, str]]:
    """The goals of these stages, in the order of the table."""
    keys = {key for stage in stages for key in stage.decides}
    return {key: words for key, words in goals.GOALS.items() if key in keys}
