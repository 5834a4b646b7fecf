"""Stages that run the carried tests on the card, alone and under compute-sanitizer."""

import os
import shutil
from pathlib import Path

from .check import CARRIED, Check
from .child import PROBLEM_LINES, TOOK_TOO_LONG, Ended
from .libtest import Tests

# For a test that is run again by itself, and what is kept for it.
ALONE_S, KEPT_S = 15.0, 17.0
# The first one is small and decides; the others are looked at while there is time.
SANITIZED = (
    "flash::a_window_of_one_key",
    "flash::head_width_256_with_window",
    "mlp_adapters::every_run_gives_the_same_bits",
)
# What compute-sanitizer says where it cannot look at a card.
SANITIZER_REFUSES = ("Device not supported", "Internal Sanitizer Error")


def judge_tests(check: Check, key: str, binary: str, ended: Ended):
    tests = Tests.of(ended)
    check.report.figures[key] = vars(tests)
    if tests.complete or tests.failed or ended.status != TOOK_TOO_LONG:
        check.report.decide(key, tests.met(), tests.in_words())
    else:
        check.report.lose(key, tests.in_words())
    if tests.panic:
        check.report.note(f"first panic of the {key}", tests.panic)
    suspect = next(iter([*tests.failed, tests.at_work]), "")
    if not suspect:
        return
    # An error of the card stays with the process: what fails by itself?
    given_s = check.stage_left()
    alone = check.run([CARRIED / binary, "--exact", "--nocapture", suspect])
    found = Tests.of(alone)
    verdict = "passes" if alone.status == 0 else found.panic or alone.tail(PROBLEM_LINES)
    check.report.note(f"{suspect} by itself", verdict)
    # One that had only just begun, or had no time by itself, may be slow and sound.
    had_time = min(given_s, ended.quiet_s) >= ALONE_S
    if alone.status == TOOK_TOO_LONG and suspect == tests.at_work and had_time:
        check.report.decide(key, False, f"{suspect} does not come to its end")


def begin_kernel_tests(check: Check):
    """Their references take the processors' time more than the card's: they run beside stages that measure
    neither time nor memory. References are computed in threads, kernels run one at a time."""
    arguments = ["--test-threads", max(1, (os.cpu_count() or 2) // 2)]
    arguments += ["norm"] if check.setup.rehearsal else []
    check.start("kernel tests", [CARRIED / "cuda_kernels", "--show-output", *arguments])


def kernel_tests(check: Check):
    ended = check.background["kernel tests"].wait(check.stage_left() - KEPT_S)
    judge_tests(check, "kernel tests", "cuda_kernels", ended)


def backend_tests(check: Check):
    arguments = ["--show-output", "--test-threads", "1", "--skip", "speed::", "--skip", "gradients::"]
    arguments += ["logits_and_loss"] if check.setup.rehearsal else []
    ended = check.run([CARRIED / "cuda_backend", *arguments], keep_s=KEPT_S)
    judge_tests(check, "backend tests", "cuda_backend", ended)


def sanitizer(check: Check):
    """Launches of our own, without cuBLAS, whose kernels take minutes under it. memcheck decides; what
    racecheck takes for a race need not be one."""
    clean = []
    for test in SANITIZED:
        ended = sanitize(check, ["memcheck"], test)
        if not is_complete(ended):
            if not clean:
                raise RuntimeError(f"memcheck did not come to its end: {ended.tail(PROBLEM_LINES)}")
            check.report.note(f"memcheck of {test}", "not finished")
            break
        if not is_clean(ended):
            return check.report.decide("sanitizer", False, f"{test}: {ended.tail(PROBLEM_LINES)}")
        clean.append(test)
        check.report.decide("sanitizer", True, f"no error in {', '.join(clean)}")
    ended = sanitize(check, ["racecheck", "--racecheck-detect-level", "error"], SANITIZED[0])
    words = "no error" if is_clean(ended) else ended.tail(PROBLEM_LINES)
    check.report.note(f"racecheck of {SANITIZED[0]}", words if is_complete(ended) else "not finished")


def sanitize(check: Check, kind: list[str], test: str) -> Ended:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise RuntimeError("not run: compute-sanitizer is not installed")
    command = [CARRIED / "cuda_kernels", "--exact", "--test-threads", "1", test]
    return check.run([tool, "--tool", *kind, "--error-exitcode", "9", *command])


def is_complete(ended: Ended) -> bool:
    refused = any(words in ended.text for words in SANITIZER_REFUSES)
    return ended.status != TOOK_TOO_LONG and not refused and "SUMMARY" in ended.text


def is_clean(ended: Ended) -> bool:
    return ended.status == 0 and "1 passed" in ended.text
