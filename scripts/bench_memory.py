#!/usr/bin/env python3
"""Runs `nibble memory --measure` on a synthetic checkpoint and tabulates plan and measurement.

Called by scripts/bench_memory.sh, which builds what it needs. Standard library only.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ("resident", "stream")
# Goals: the peak within this share of the plan, and the losses equal.
LARGEST_DIFFERENCE = 0.03
# What the checkpoints of a shape take on the disk at a time.
DISK_GB = {"llama-2-7b": 18, "1b": 3.2, "tiny": 0.01}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--nibble", required=True, type=Path, help="the binary")
    add("--preset", default="llama-2-7b", help="shape of the model, as make_checkpoint.py has it")
    add("--work", type=Path, help="folder for the checkpoint")
    add("--max-length", default="512")
    add("--steps", default="1")
    add("--activations", default="checkpoint")
    add("--threads", default=str(os.cpu_count()))
    add("--check", action="store_true", help="write no file, fail where a goal is missed")
    return parser.parse_args()


def run(command):
    start = time.monotonic()
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stderr}")
    return done, time.monotonic() - start


def measure(arguments, folder, mode):
    command = [arguments.nibble, "memory", "--model", folder, "--weights", mode, "--json"]
    command += ["--max-length", arguments.max_length, "--measure", arguments.steps]
    command += ["--activations", arguments.activations, "--threads", arguments.threads]
    done, seconds = run(command)
    plan = json.loads(done.stdout)
    steps = re.findall(r"loss ([0-9.]+)  ([0-9.]+) tokens/s", done.stderr)
    return {
        "weights": mode,
        "planned_bytes": plan["total_bytes"],
        "peak_bytes": plan["measured"]["peak_bytes"],
        "rows": plan["measured"]["rows"],
        "losses": [loss for loss, _ in steps],
        "tokens_per_second": [float(rate) for _, rate in steps],
        "seconds": seconds,
    }


def table(arguments, runs, quantize_seconds):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    lines = [
        f"# Memory of training, {arguments.preset}",
        "",
        f"Made by `scripts/bench_memory.sh --preset {arguments.preset} --max-length {arguments.max_length} "
        f"--steps {arguments.steps}` on {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip()}, "
        f"{arguments.threads} threads, {platform.machine()}.",
        f"Random weights in NF4 with double quantization; quantizing them took {quantize_seconds:.0f} s. "
        f"LoRA of rank 16 on all linear layers, one sequence of {arguments.max_length} tokens, activations: "
        f"{arguments.activations}.",
        "",
        "| part | " + " | ".join(f"{r['weights']}: planned | measured" for r in runs) + " |",
        "|---|" + "---|---|" * len(runs),
    ]
    rows = [{row["name"]: row for row in one["rows"]} for one in runs]
    names = dict.fromkeys(name for one in rows for name in one)
    for name in sorted(names, key=lambda name: -max(peak(one.get(name)) for one in rows)):
        cells = []
        for one in rows:
            part = one.get(name)
            cells += [mebibytes(part[key]) if part else "" for key in ("planned_bytes", "measured_bytes")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    totals = []
    for one in runs:
        difference = 100 * (one["peak_bytes"] / one["planned_bytes"] - 1)
        totals += [mebibytes(one["planned_bytes"]), f"{mebibytes(one['peak_bytes'])} ({difference:+.1f} %)"]
    lines.append("| **all, peak RSS** | " + " | ".join(totals) + " |")
    for one in runs:
        rates = ", ".join(map(str, one["tokens_per_second"]))
        lines.append("")
        lines.append(f"{one['weights']}: loss {', '.join(one['losses'])}; {rates} tokens/s; "
                     f"{one['seconds']:.0f} s in all.")
    resident, streamed = (statistics.median(one["tokens_per_second"]) for one in runs)
    lines += ["", f"Streamed steps have {streamed / resident:.2f} of the resident ones' speed (medians)."]
    return "\n".join(lines) + "\n"


def peak(row):
    return row["measured_bytes"] if row else 0


def mebibytes(count):
    return f"{count / (1 << 20):.1f} MiB"


def check(runs):
    missed = []
    for one in runs:
        difference = abs(one["peak_bytes"] / one["planned_bytes"] - 1)
        if difference > LARGEST_DIFFERENCE:
            missed.append(f"{one['weights']}: peak differs from the plan by {difference:.1%}")
    if runs[0]["losses"] != runs[1]["losses"]:
        missed.append("losses of streamed weights differ from those of resident ones")
    return missed


def main():
    arguments = parse_arguments()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        free_gb = shutil.disk_usage(work).free / 1e9
        if free_gb < DISK_GB.get(arguments.preset, 0):
            what = f"{work} has {free_gb:.1f} GB free, {arguments.preset} needs {DISK_GB[arguments.preset]}"
            if arguments.check:
                return print(f"skipped: {what}")
            sys.exit(what)
        dense, packed = Path(work, "dense"), Path(work, "packed")
        generator = Path(__file__).with_name("make_checkpoint.py")
        run([sys.executable, generator, dense, "--preset", arguments.preset])
        _, quantize_seconds = run([arguments.nibble, "quantize", "--model", dense, "--out", packed])
        shutil.rmtree(dense)
        runs = [measure(arguments, packed, mode) for mode in MODES]
    text = table(arguments, runs, quantize_seconds)
    print(text)
    missed = check(runs)
    if not arguments.check:
        out = Path("docs/benchmarks")
        (out / f"memory-{arguments.preset}.md").write_text(text)
        (out / f"memory-{arguments.preset}.json").write_text(json.dumps(runs, indent=1) + "\n")
    elif missed:
        sys.exit("\n".join(missed))
    for line in missed:
        print(f"missed: {line}")


main()
