"""The stage that trains with PEFT + bitsandbytes, and the goals beside it."""

from . import goals
from .check import Check
from .child import PROBLEM_LINES
from .nibble import GIB
from .training import rows_8b


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
        words += f"allocated {way['allocated_bytes'] / GIB:.2f}; first loss {way['losses'][0]:.3f}"
        check.report.note(f"PEFT + bitsandbytes, {way['way']}, {way['tokens']} tokens", words)
    found = [way for way in found if way["tokens"] == check.setup.length]
    if not found:
        raise RuntimeError(ended.tail(PROBLEM_LINES))
    fastest = max(way["tokens_per_second"] for way in found)
    for name, goal in [("checkpoint", goals.SPEED_CHECKPOINT), ("auto", goals.SPEED_AUTO)]:
        judge_speed(check, name, goal, fastest)
    judge_peak(check, min(way["card_bytes"] for way in found))
    judge_losses(check, found[0])


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


def judge_losses(check: Check, way: dict):
    """The same weights and rows on both sides, and B = 0: the first step's loss is the base model's. Later
    ones depend on A, which is random, and on the schedule."""
    runs = {name: check.runs.get(f"8B {name}") for name in ("checkpoint", "auto")}
    runs = {name: run.losses for name, run in runs.items() if run is not None and run.losses}
    if not runs:
        return check.report.lose("first loss", "Nibble has no figure")
    gaps = {name: [abs(a / b - 1) for a, b in zip(losses, way["losses"])] for name, losses in runs.items()}
    first = ", ".join(f"{name} {gap[0]:.3%} off" for name, gap in gaps.items())
    losses = ", ".join(f"{name} {losses[0]:.5f}" for name, losses in runs.items())
    met = all(gap[0] <= goals.FIRST_LOSS_GAP for gap in gaps.values())
    check.report.decide("first loss", met, f"{first}: {losses}, the peer {way['losses'][0]:.5f}")
    later = ", ".join(f"{name} at most {max(gap):.3%} in {len(gap)} steps" for name, gap in gaps.items())
    check.report.note(f"losses beside the peer's, {way['way']}", later)
