"""The check of scripts/gpu_check.sh, which is what to call: `gpu_check.py check [STAGES] | rehearse`."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

from gpu import conditions
from gpu.check import CARRIED, ROOT, Check, NoCard, end_with_table, packed_commit
from gpu.rehearsal import Rehearsal
from gpu.report import EXIT_STATUS, Report
from gpu.setup import CARD
from gpu.stages import TELLING, Stage, chosen, decided_by

USAGE, DID_NOT_RUN = 2, 3
LEAST_SECONDS = 5.0


def run_stage(check: Check, stage: Stage) -> bool:
    """Whatever happens in a stage becomes a row; false if something did."""
    left = check.left()
    if left < LEAST_SECONDS:
        lose(check, stage, "no time was left")
        return False
    begun, mark = time.monotonic(), check.conditions.mark()
    check.stage_end = begun + min(stage.need_s, left)
    try:
        stage.action(check)
        return True
    except (NoCard, KeyboardInterrupt):
        raise
    except Exception as error:  # the next stages are worth their time
        check.children.log(traceback.format_exc() + "\n")
        lose(check, stage, str(error) or type(error).__name__)
        return False
    finally:
        seconds = check.report.figures.setdefault("seconds", {})
        seconds[stage.name] = round(time.monotonic() - begun, 1)
        print(f"{stage.name}: {seconds[stage.name]} s", flush=True)
        if stage.timed:
            note_conditions(check, stage.name, mark)
        check.report.save()


def note_conditions(check: Check, stage: str, mark: int):
    """What the card was like during a stage, as far as it is known."""
    if found := check.conditions.since(mark):
        stages = check.report.figures.setdefault("conditions", {})
        stages[stage] = found
        check.report.note("clock, power and heat of the card at work", conditions.in_words(stages))


def lose(check: Check, stage: Stage, why: str):
    if not stage.decides:
        check.report.note(f"stage {stage.name}", why)
    for key in stage.decides:
        check.report.lose(key, why)


def run_stages(check: Check, stages: list[Stage]):
    left = list(stages)
    while left:
        stage = left.pop(0)
        if not run_stage(check, stage) and stage.name in TELLING:
            left.sort(key=lambda stage: not stage.diagnosis)


def run_to_an_end(check: Check, stages: list[Stage]):
    """Whatever happens, what was found is kept; only without a card there is nothing."""
    try:
        run_stages(check, stages)
    except NoCard:
        raise
    except KeyboardInterrupt:
        check.report.warn("ENDED BEFORE ITS TIME")
    except Exception:  # of the check itself
        check.report.warn(f"THE CHECK FAILED: {traceback.format_exc()}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def check_card(check: Check, stages: list[Stage]) -> int:
    signal.signal(signal.SIGTERM, end_with_table)
    try:
        run_to_an_end(check, stages)
        check.children.end_all()
        check.report.save()
        print(f"\n{check.report.text()}\n\n{check.report.summary()}", flush=True)
        return EXIT_STATUS[check.report.verdict()]
    except NoCard as error:
        check.report.remove()
        print(f"GPU CHECK DID NOT RUN: {error}")
        return DID_NOT_RUN
    finally:
        check.close()


def main(mode: str, only: str = "") -> int:
    if mode == "rehearse":
        with Rehearsal() as rehearsal:
            status = check_card(rehearsal.check, rehearsal.stages)
            return rehearsal.judge(status)
    try:
        stages = chosen([name.strip() for name in only.split(",") if name.strip()])
    except ValueError as error:
        print(f"GPU CHECK DID NOT RUN: {error}")
        return USAGE
    out = os.environ.get("OUT")
    folder, stem = (Path(out), "gpu_check") if out else (ROOT / "docs/benchmarks", None)
    log = (Path(out) if out else CARRIED) / "gpu_check.log"
    report = Report(folder, stem, decided_by(stages), packed_commit(), partial=bool(only))
    return check_card(Check(CARD, stages, report, log), stages)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
