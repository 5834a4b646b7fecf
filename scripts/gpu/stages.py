"""The stages, in order: what each needs, what it decides, what it does."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import goals
from .check import CARRIED, SCRIPTS, Check, NoCard, require_driver, write_jsonl
from .child import Ended
from .libtest import Tests
from .nibble import GIB, Run, step_flops

PROBLEM_LINES = 30
# Kernels of a step that the table names; the figures have all.
PROFILE_PARTS = 12
# For a test that is run again by itself.
ALONE_S = 15.0
# What a step of 120,000 tokens takes, at least.
LONG_STEP_S = 130.0
# What compute-sanitizer says where it cannot look at a card.
SANITIZER_REFUSES = ("Device not supported", "Internal Sanitizer Error")


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
        "32B": (setup.preset_32b, check.shared),
    }
    for name, place in places.items():
        if name in check.models:
            check.make_model(name, *place)
    if "curve model" in check.models:
        write_curve_rows(check)
        model = check.model("curve model")
        check.start("curve on the CPU", curve_arguments(check, model, "curve-cpu", "cpu"))


def doctor(check: Check):
    ended = check.run([CARRIED / "nibble", "doctor", "--json"])
    at = ended.text.find("{")
    if at < 0:
        check.report.decide("doctor", False, ended.tail())
        raise RuntimeError(ended.tail())
    found, _ = json.JSONDecoder().raw_decode(ended.text[at:])
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


def host_kib(field: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def machine(check: Check):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    check.report.note("card, driver, memory", check.run(query).text.strip())
    spaces = {str(path): shutil.disk_usage(path).free for path in (check.folder, check.shared)}
    memory = {field: host_kib(field) for field in ("MemTotal", "MemAvailable")}
    figures = {"processors": os.cpu_count(), "memory_kib": memory, "free_bytes": spaces}
    check.report.figures["machine"] = figures


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


def rate(check: Check, name: str) -> float | None:
    return check.report.figures.get("rates", {}).get(name)


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
    fastest = max(copied, rate(check, "copy_gb_per_s") or 0.0)
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
    own, torch = found["attention_ms"], rate(check, "attention_ms")
    if torch is None:
        return check.report.lose("attention", f"{own:.2f} ms; PyTorch has no figure")
    words = f"{torch / own:.0%}: {own:.2f} ms, PyTorch {torch:.2f} ms, {found['attention_tokens']} tokens"
    check.report.decide("attention", torch / own >= goals.ATTENTION_SHARE, words)


def gradients(check: Check):
    test = "gradients::of_blocks_of_an_8b_model_match_the_cpu"
    ended = check.run([CARRIED / "cuda_backend", "--exact", "--nocapture", test])
    found = ended.result("GRADIENTS")
    check.report.figures["gradients"] = found
    if None in (found["largest"], found["mean"]):
        return check.report.decide("gradients", False, f"{found['worst']} is not finite")
    words = f"{found['largest']:.2%} in {found['worst']}, mean {found['mean']:.2%}, {found['tokens']} tokens"
    check.report.decide("gradients", found["largest"] <= goals.GRADIENT_ERROR, words)


# ---------------------------------------------------------------- training


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
    judge_plan(check)
    speed = run.check().tokens_per_second(setup.warm_up)
    check.report.note(f"Nibble, {name}", f"{speed:,.0f} tokens/s; {run.in_words()}")
    return run


def checkpoint_8b(check: Check):
    achieved = tflops(check, train_8b(check, "checkpoint"))
    cublas = rate(check, "cublas_tflops")
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
    """Beside the peer's figures for rows of half the length."""
    train_8b(check, "auto", check.setup.length // 2)


def judge_plan(check: Check):
    """The worst of the runs so far."""
    short = [name for name, run in check.runs.items() if run.out_of_memory]
    if short:
        check.report.decide("plan", False, f"memory ran short: {', '.join(short)}")
        return
    errors = [(run.plan_error(), name) for name, run in check.runs.items() if run.finished]
    if errors:
        error, name = max(errors)
        words = f"{error:.2%} off in {name}, {len(errors)} runs"
        check.report.decide("plan", error <= goals.PLAN_ERROR, words)


def peer(check: Check):
    """Each goal beside the better of the peer's ways."""
    if check.setup.rehearsal:
        ended = check.python("rehearsed.py", "peer")
    else:
        check.awaited("imports")
        steps = [check.setup.steps, check.setup.warm_up, check.stage_left()]
        ended = check.python("peer.py", check.model("8B"), rows_8b(check, check.setup.length), *steps)
    found = ended.results("PEER")
    check.report.figures["peer"] = found
    for way in found:
        words = f"{way['tokens_per_second']:,.0f} tokens/s; card {way['card_bytes'] / GIB:.2f} GiB, "
        words += f"allocated {way['allocated_bytes'] / GIB:.2f}; first loss {way['first_loss']:.3f}"
        check.report.note(f"PEFT + bitsandbytes, {way['way']}, {way['tokens']} tokens", words)
    found = [way for way in found if way["tokens"] == check.setup.length]
    if not found:
        raise RuntimeError(ended.tail(PROBLEM_LINES))
    fastest = max(way["tokens_per_second"] for way in found)
    for name, goal in [("checkpoint", goals.SPEED_CHECKPOINT), ("auto", goals.SPEED_AUTO)]:
        judge_speed(check, name, goal, fastest)
    judge_peak(check, min(way["card_bytes"] for way in found))


def judge_speed(check: Check, name: str, goal: float, fastest: float):
    run = check.runs.get(f"8B {name}")
    if run is None or not run.finished:
        return check.report.lose(f"speed {name}", "Nibble has no figure")
    own = run.tokens_per_second(check.setup.warm_up)
    words = f"{own / fastest:.2f}x: {own:,.0f}, the peer {fastest:,.0f} tokens/s"
    check.report.decide(f"speed {name}", own / fastest >= goal, words)


def judge_peak(check: Check, smallest: int):
    run = check.runs.get("8B checkpoint")
    if run is None or not run.finished:
        return check.report.lose("peak", "Nibble has no figure")
    share = run.peak_bytes / smallest
    words = f"{share:.0%}: {run.peak_bytes / GIB:.2f} GiB, the peer {smallest / GIB:.2f}"
    check.report.decide("peak", share <= goals.PEAK_SHARE, words)


def train_long(check: Check, goal: str, name: str, length: int, steps: int, *more: str):
    """Whether it trains at all, within the budget."""
    model = check.model(name)
    rows = check.write_rows(f"rows of {name}", steps, length, check.config(name)["vocab_size"])
    flags = ["--max-steps", steps, "--memory-budget", check.setup.budget, "--self-checks", "false", *more]
    run = check.train(goal, model, rows, length, *flags)
    judge_plan(check)
    words = f"{len(run.losses)} steps"
    if run.losses:
        words += f", {run.rates[-1]:,.0f} tokens/s; {run.in_words()}"
        within = run.peak_bytes <= parse_gib(check.setup.budget)
        trained = not run.out_of_memory and run.tokens == length and all(map(is_finite, run.losses))
        check.report.decide(goal, within and trained, words)
    elif run.out_of_memory or run.ended.status not in (0, 124):
        check.report.decide(goal, False, run.out_of_memory or run.ended.tail())
    else:
        raise RuntimeError(run.ended.tail())


def is_finite(loss: float | None) -> bool:
    return loss is not None and abs(loss) < float("inf")


def parse_gib(size: str) -> float:
    return float(size.removesuffix("GiB")) * GIB


def train_32b(check: Check):
    train_long(check, "32B", "32B", check.setup.length_32b, 3)
    shutil.rmtree(check.model("32B"))


def require_pinnable_memory(check: Check):
    needed_gib = 2 * goals.LONG_PINS_GIB
    if free_gib() < needed_gib:
        # A virtual machine may be given its memory as it is used, and tell of less until then.
        check.run([sys.executable, SCRIPTS / "gpu" / "touch_memory.py", needed_gib], LONG_STEP_S)
    if (free := free_gib()) < needed_gib:
        words = f"{free:.0f} GiB of the host's memory are free, half of it may be pinned"
        raise RuntimeError(f"{words}; {goals.LONG_PINS_GIB} GiB are needed")


def free_gib() -> float:
    return host_kib("MemAvailable") / 2**20


def train_8b_long(check: Check):
    if not check.setup.rehearsal:
        require_pinnable_memory(check)
    # The leanest way: `auto` would fill the budget to save time.
    lean = ["--activations", "offload", "--dequantized-blocks", "0"]
    train_long(check, "8B long", "8B", check.setup.length_long, 1, *lean)


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
    of_model = ["--model", model, "--adapter", run, *place]
    adapter = run / "adapter_model.safetensors"
    before = adapter.read_bytes()
    shutil.rmtree(run / f"checkpoint-{check.setup.curve_steps}")
    length = ["--max-length", check.setup.curve_length]
    commands = {
        "resume": ["train", "--out", run, "--resume"],
        "eval": ["eval", *of_model, "--data", check.folder / "curve.jsonl", *length],
        "generate": ["generate", *of_model, "--raw", "--prompt", "w5 w7 w9", "--max-new-tokens", 8],
    }
    ended = {name: check.run([nibble, *arguments]) for name, arguments in commands.items()}
    late = [name for name, it in ended.items() if it.status == 124]
    if late:
        raise RuntimeError(f"{', '.join(late)} took too long")
    problems = [f"{name}: {it.tail()}" for name, it in ended.items() if it.status or not it.text.strip()]
    if adapter.read_bytes() != before:
        problems.append("a resumed run has another adapter")
    check.report.decide("smoke", not problems, "; ".join(problems) or "resumed bit for bit")


# ---------------------------------------------------------------- tests


def judge_tests(check: Check, key: str, binary: str, ended: Ended):
    tests = Tests.of(ended)
    check.report.figures[key] = vars(tests)
    if tests.complete or tests.failed or ended.status != 124:
        check.report.decide(key, tests.met(), tests.in_words())
    else:
        check.report.lose(key, tests.in_words())
    if tests.panic:
        check.report.note(f"first panic of the {key}", tests.panic)
    suspect = next(iter([*tests.failed, tests.at_work]), "")
    if suspect:
        # An error of the card stays with the process: what fails by itself?
        alone = check.run([CARRIED / binary, "--exact", "--nocapture", suspect])
        found = Tests.of(alone)
        verdict = "passes" if alone.status == 0 else found.panic or alone.tail(PROBLEM_LINES)
        check.report.note(f"{suspect} by itself", verdict)
        if alone.status == 124:
            check.report.decide(key, False, f"{suspect} does not come to its end")


def begin_kernel_tests(check: Check):
    """Their references take the processors' time more than the card's: they run beside stages that measure
    neither time nor memory. References are computed in threads, kernels run one at a time."""
    arguments = ["--test-threads", max(1, (os.cpu_count() or 2) // 2)]
    arguments += ["norm"] if check.setup.rehearsal else []
    check.start("kernel tests", [CARRIED / "cuda_kernels", "--show-output", *arguments])


def kernel_tests(check: Check):
    ended = check.background["kernel tests"].wait(check.stage_left() - ALONE_S)
    judge_tests(check, "kernel tests", "cuda_kernels", ended)


def backend_tests(check: Check):
    arguments = ["--show-output", "--test-threads", "1", "--skip", "speed::", "--skip", "gradients::"]
    arguments += ["logits_and_loss"] if check.setup.rehearsal else []
    ended = check.run([CARRIED / "cuda_backend", *arguments], keep_s=ALONE_S)
    judge_tests(check, "backend tests", "cuda_backend", ended)


def sanitizer(check: Check):
    """Launches of our own, without cuBLAS, whose kernels take minutes under it."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise RuntimeError("not run: compute-sanitizer is not installed")
    for kind in ("memcheck", "racecheck"):
        test = [CARRIED / "cuda_kernels", "--exact", "--test-threads", "1", "flash::a_window_of_one_key"]
        ended = check.run([tool, "--tool", kind, "--error-exitcode", "9", *test])
        refused = any(words in ended.text for words in SANITIZER_REFUSES)
        if ended.status == 124 or refused or "SUMMARY" not in ended.text:
            raise RuntimeError(f"{kind} did not come to its end: {ended.tail(PROBLEM_LINES)}")
        if ended.status != 0 or "1 passed" not in ended.text:
            return check.report.decide("sanitizer", False, f"{kind}: {ended.tail(PROBLEM_LINES)}")
    check.report.decide("sanitizer", True, "memcheck, racecheck: no error")


CURVE, B8, B32 = ("curve model",), ("8B",), ("32B",)
STAGES = [
    Stage("begin", 60, begin),
    Stage("doctor", 120, doctor, ("doctor",)),
    Stage("machine", 15, machine),
    Stage("rates", 100, rates),
    Stage("speed", 60, speed, ("dequantize", "exposed", "attention"), after=("rates",)),
    Stage("8B checkpoint", 70, checkpoint_8b, ("utilisation", "plan"), after=("rates",), models=B8),
    Stage("8B auto", 60, auto_8b, ("plan",), models=B8),
    Stage(
        "peer",
        120,
        peer,
        ("speed checkpoint", "speed auto", "peak"),
        after=("8B checkpoint", "8B auto"),
        models=B8,
    ),
    Stage("begin kernel tests", 15, begin_kernel_tests, diagnosis=True),
    Stage("gradients", 60, gradients, ("gradients",), diagnosis=True),
    Stage("curve", 60, curve, ("curve",), models=CURVE),
    Stage("smoke", 45, smoke, ("smoke",), after=("curve",), models=CURVE),
    Stage(
        "kernel tests", 80, kernel_tests, ("kernel tests",), after=("begin kernel tests",), diagnosis=True
    ),
    Stage("backend tests", 80, backend_tests, ("backend tests",), diagnosis=True),
    Stage("sanitizer", 60, sanitizer, ("sanitizer",)),
    Stage("32B", 100, train_32b, ("32B", "plan"), models=B32),
    Stage("8B long", 400, train_8b_long, ("8B long", "plan"), models=B8),
    Stage("8B of half length", 40, half_8b, after=("peer",), models=B8),
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
