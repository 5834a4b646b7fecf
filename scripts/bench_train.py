#!/usr/bin/env python3
"""Runs Nibble and the peer interleaved and tabulates tokens per second, memory and start-up.

Called by scripts/bench_train.sh, which builds what it needs. Standard library only.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROW_LENGTH = 512
RANK = 16
LEARNING_RATE = 2e-4
WARMUP_STEPS = 1

# name: rows, quantization, activations, which base folder, precision of the products
SCENARIOS = {
    "text-keep": ("text", "nf4", "keep", "dense", "f32"),
    "text-checkpoint": ("text", "nf4", "checkpoint", "dense", "f32"),
    "text-f32": ("text", "none", "keep", "dense", "f32"),
    "chat-keep": ("chat", "nf4", "keep", "dense", "f32"),
    "chat-checkpoint": ("chat", "nf4", "checkpoint", "dense", "f32"),
    "text-prequantized": ("text", "nf4", "keep", "quantized", "f32"),
    "text-keep-bf16": ("text", "nf4", "keep", "dense", "bf16"),
    "text-checkpoint-bf16": ("text", "nf4", "checkpoint", "dense", "bf16"),
    "chat-keep-bf16": ("chat", "nf4", "keep", "dense", "bf16"),
    "chat-checkpoint-bf16": ("chat", "nf4", "checkpoint", "dense", "bf16"),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--nibble", required=True, type=Path, help="the binary")
    add("--peak", required=True, type=Path, help="the fma_peak example")
    add("--model", required=True, type=Path, help="dense Hugging Face folder")
    add("--python", type=Path, help="Python with torch, transformers, peft and bitsandbytes")
    add("--rounds", type=int, default=3, help="times that each scenario is run")
    add("--steps", type=int, default=8, help="steps of a run; the first is warm-up")
    add("--batch", type=int, default=4, help="rows in a step")
    add("--cores", default="0,1", help="processors to run on, one thread each")
    add("--scenarios", default=",".join(SCENARIOS), help="which, comma-separated")
    add("--passive", action="store_true", help="the peer's OpenMP threads sleep while they wait")
    add("--out", type=Path, default=Path("docs/benchmarks/cpu-train"), help="path without suffix")
    arguments = parser.parse_args()
    arguments.scenarios = arguments.scenarios.split(",")
    unknown = set(arguments.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"unknown scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    arguments.cores = [int(core) for core in arguments.cores.split(",")]
    return arguments


# Data: random token ids. What they say does not change the work; their number and mask do.


def text_rows(count, vocabulary):
    """Full rows, every token trained."""
    draw = random.Random(1)
    for _ in range(count):
        ids = [draw.randrange(3, vocabulary) for _ in range(ROW_LENGTH)]
        yield {"input_ids": ids, "labels": ids}


def chat_rows(count, vocabulary):
    """128 to 512 tokens in two exchanges, of which the answers, one half, are trained."""
    draw = random.Random(2)
    for _ in range(count):
        turn = draw.randrange(ROW_LENGTH // 16, ROW_LENGTH // 4 + 1)
        ids = [draw.randrange(3, vocabulary) for _ in range(4 * turn)]
        masked = [-100] * turn
        labels = masked + ids[turn : 2 * turn] + masked + ids[3 * turn :]
        yield {"input_ids": ids, "labels": labels}


def write_rows(kind, folder, arguments, config):
    path = folder / f"{kind}.jsonl"
    make = {"text": text_rows, "chat": chat_rows}[kind]
    # Packed rows hold more short documents than padded ones: enough for both.
    rows = list(make(4 * arguments.batch * arguments.steps, config["vocab_size"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def operations_per_token(config, rows, policy):
    """Floating-point operations that a trained token needs, in the mean over the rows.

    2 per weight forward, 2 backward (no weight gradient), 2 more where recomputed; the head on
    trained tokens only; 6 per LoRA weight (8); causal attention L·H·S·(2 + 5 [+ 2]) per head size.
    """
    width, feed_forward = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or width // heads
    shapes = [(width, heads * size), (width, kv_heads * size), (width, kv_heads * size)]
    shapes += [(heads * size, width)] + [(width, feed_forward)] * 2 + [(feed_forward, width)]
    layers = config["num_hidden_layers"]
    weights = layers * sum(a * b for a, b in shapes)
    lora = layers * RANK * sum(a + b for a, b in shapes)
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths)
    trained = sum(label >= 0 for row in rows for label in row["labels"][1:]) / tokens
    attended = sum(length * length for length in lengths) / tokens
    again = policy == "checkpoint"
    return (
        (6 if again else 4) * weights
        + 4 * config["vocab_size"] * width * trained
        + (8 if again else 6) * lora
        + layers * heads * size * attended * (9 if again else 7)
    )


# Runs


def run_pinned(command, cores, watch=None):
    """Runs a command on these cores. Returns (seconds, peak RSS in MiB, what `watch` returned)."""
    with tempfile.TemporaryFile("w+") as log:
        begun = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        seen = {}
        watcher = threading.Thread(target=lambda: seen.update(watch(process, begun)))
        if watch:
            watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if watch:
            watcher.join()
        if process.returncode != 0:
            log.seek(0)
            sys.exit(
                f"{log.read()}\nerror: exit {process.returncode}: {shlex.join(map(str, command))}"
            )
        return time.monotonic() - begun, usage.ru_maxrss / 1024, seen


def peak_gflops(arguments):
    command = [str(arguments.peak), str(len(arguments.cores)), "1"]
    pin = lambda: os.sched_setaffinity(0, arguments.cores)
    return float(subprocess.run(command, capture_output=True, check=True, preexec_fn=pin).stdout)


def nibble_command(arguments, scenario, model, rows, out):
    _, quantization, activations, _, precision = SCENARIOS[scenario]
    flags = {
        "model": model,
        "data": rows,
        "out": out,
        "quantization": quantization,
        "device": "cpu",
        "bf16": str(precision == "bf16").lower(),
        "activations": activations,
        "lora-r": RANK,
        "lora-alpha": 2 * RANK,
        "learning-rate": LEARNING_RATE,
        "lr-scheduler-type": "constant",
        "warmup-ratio": 0,
        "max-grad-norm": 1,
        "max-length": ROW_LENGTH,
        "per-device-train-batch-size": arguments.batch,
        "gradient-accumulation-steps": 1,
        "max-steps": arguments.steps,
        "logging-steps": 1,
        "shuffle": "false",
        "threads": len(arguments.cores),
    }
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [arguments.nibble, "train", *pairs]


def read_steps(metrics):
    if not metrics.exists():
        return []
    lines = metrics.read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in events if event.get("event") == "step"]


def run_nibble(arguments, scenario, model, rows, folder):
    out = folder / "run"
    metrics = out / "metrics.jsonl"

    def watch_first_step(process, begun):
        """When the first step began: its line appears when it ends, and says how long it took."""
        while process.returncode is None:
            steps = read_steps(metrics)
            if steps:
                return {"start": time.monotonic() - begun - steps[0]["elapsed_seconds"]}
            time.sleep(0.002)
        return {}

    command = nibble_command(arguments, scenario, model, rows, out)
    _, peak_mib, seen = run_pinned(command, arguments.cores, watch_first_step)
    steps, before = [], {"elapsed_seconds": 0, "num_input_tokens_seen": 0}
    for event in read_steps(metrics):
        steps.append(
            {
                "seconds": event["elapsed_seconds"] - before["elapsed_seconds"],
                "tokens": event["num_input_tokens_seen"] - before["num_input_tokens_seen"],
                "loss": event["loss"],
                "grad_norm": event["grad_norm"],
            }
        )
        before = event
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return {"steps": steps, "peak_rss_mib": peak_mib, "start_seconds": seen.get("start")}


def run_peer(arguments, scenario, model, rows, folder):
    _, quantization, activations, _, precision = SCENARIOS[scenario]
    out = folder / "peer.json"
    command = [arguments.python, Path(__file__).with_name("peer_bench.py")]
    command += ["--model", model, "--rows", rows, "--out", out, "--quantization", quantization]
    command += [
        "--activations",
        activations,
        "--batch",
        arguments.batch,
        "--steps",
        arguments.steps,
    ]
    command += ["--threads", len(arguments.cores), "--r", RANK, "--alpha", 2 * RANK]
    command += ["--precision", precision]
    command += ["--passive"] if arguments.passive else []
    _, peak_mib, _ = run_pinned(command, arguments.cores)
    result = json.loads(out.read_text())
    result["peak_rss_mib"] = peak_mib
    result["start_seconds"] = result["import_seconds"] + result["load_seconds"]
    return result


def tokens_per_second(run):
    return statistics.median(
        step["tokens"] / step["seconds"] for step in run["steps"][WARMUP_STEPS:]
    )


def measure(arguments, folder, config):
    """All rounds: each scenario, peak and Nibble and peak and peer."""
    quantized = folder / "quantized"
    if any(SCENARIOS[name][3] == "quantized" for name in arguments.scenarios):
        run_pinned(
            [arguments.nibble, "quantize", "--model", arguments.model, "--out", quantized],
            arguments.cores,
        )
    data = {kind: write_rows(kind, folder, arguments, config) for kind in ("text", "chat")}
    contestants = {"nibble": run_nibble} | ({"peer": run_peer} if arguments.python else {})
    runs = []
    for round_index in range(arguments.rounds):
        for scenario in arguments.scenarios:
            kind, _, policy, base, _ = SCENARIOS[scenario]
            path, rows = data[kind]
            model = {"dense": arguments.model, "quantized": quantized}[base]
            operations = operations_per_token(config, rows, policy)
            for who, run in contestants.items():
                before = peak_gflops(arguments)
                result = run(arguments, scenario, model, path, folder)
                peak = (before + peak_gflops(arguments)) / 2
                rate = tokens_per_second(result)
                result |= {
                    "round": round_index,
                    "scenario": scenario,
                    "who": who,
                    "fma_peak_gflops": peak,
                    "tokens_per_second": rate,
                    "share_of_limit": rate * operations / peak / 1e9,
                }
                runs.append(result)
                print(
                    f"{round_index} {scenario:20} {who:7} {rate:7.1f} tokens/s"
                    f" {result['share_of_limit']:5.1%} of {peak:.0f} GFLOP/s"
                    f" {result['peak_rss_mib']:6.0f} MiB",
                    file=sys.stderr,
                )
    return runs


# Tables


def median_of(runs, scenario, who, key):
    values = [run[key] for run in runs if (run["scenario"], run["who"]) == (scenario, who)]
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def summarise(runs, scenarios):
    """One record a scenario: medians over the rounds, and the median of the rounds' ratios."""
    summary = []
    for scenario in scenarios:
        record = {"scenario": scenario}
        for who in ("nibble", "peer"):
            for key in ("tokens_per_second", "peak_rss_mib", "start_seconds", "share_of_limit"):
                record[f"{who}_{key}"] = median_of(runs, scenario, who, key)
        rates = {
            who: [
                run["tokens_per_second"]
                for run in runs
                if (run["scenario"], run["who"]) == (scenario, who)
            ]
            for who in ("nibble", "peer")
        }
        ratios = [ours / theirs for ours, theirs in zip(rates["nibble"], rates["peer"])]
        record["speed_ratio"] = statistics.median(ratios) if ratios else None
        summary.append(record)
    return summary


def cell(value, form):
    return "–" if value is None else format(value, form)


def markdown(report):
    head = (
        "| scenario | Nibble tokens/s | peer tokens/s | ratio | Nibble share of FMA limit |"
        " Nibble peak RSS MiB | peer | share | Nibble start s | peer |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for record in report["summary"]:
        ours, theirs = record["nibble_peak_rss_mib"], record["peer_peak_rss_mib"]
        cells = [
            record["scenario"],
            cell(record["nibble_tokens_per_second"], ".1f"),
            cell(record["peer_tokens_per_second"], ".1f"),
            cell(record["speed_ratio"], ".2f"),
            cell(record["nibble_share_of_limit"], ".1%"),
            cell(ours, ".0f"),
            cell(theirs, ".0f"),
            cell(theirs and ours / theirs, ".1%"),
            cell(record["nibble_start_seconds"], ".2f"),
            cell(record["peer_start_seconds"], ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    peaks = [run["fma_peak_gflops"] for run in report["runs"]]
    versions = next((run["versions"] for run in report["runs"] if "versions" in run), {})
    peer = ", ".join(f"{name} {version}" for name, version in versions.items()) or "not run"
    return (
        "# Training on the CPU\n\n"
        f"Made by `{report['command']}` on {report['date']}, commit {report['commit']}.\n"
        f"{report['processor']}, {report['threads']} threads on as many cores; FMA peak while"
        f" running {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s.\nPeer: {peer}.\n\n"
        + head
        + "".join(lines)
        + "\nMedians over the rounds; the ratio is the median of the rounds' ratios. What the columns"
        " and scenarios mean: [README](README.md).\n"
    )


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main():
    arguments = parse_arguments()
    config = json.loads((arguments.model / "config.json").read_text())
    commit = ["git", "describe", "--always", "--dirty"]
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(arguments, Path(folder), config)
    shown = ["--model", arguments.model.name] + (["--python", "python"] if arguments.python else [])
    shown += ["--rounds", arguments.rounds, "--steps", arguments.steps]
    shown += ["--scenarios", ",".join(arguments.scenarios)] + ["--passive"] * arguments.passive
    report = {
        "command": "scripts/bench_train.sh " + shlex.join(map(str, shown)),
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "processor": processor(),
        "threads": len(arguments.cores),
        "summary": summarise(runs, arguments.scenarios),
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


main()
