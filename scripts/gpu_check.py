"""The measurements of scripts/gpu_check.sh, which is what to call.

Every stage that fails or cannot run is a row that says so; the last line sums them up.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "gpu_check"
REHEARSAL = sys.argv[1:] == ["rehearse"]
PRESET, LENGTH, VOCABULARY = ("tiny", 64, 512) if REHEARSAL else ("llama-3.1-8b", 4096, 128256)
STEPS, WARM_UP = 8, 3
DEVICE = "cpu" if REHEARSAL else "cuda"


def run(arguments, seconds, **environment):
    """Output and status: 124 for a stage that takes too long, 127 for a missing program."""
    try:
        done = subprocess.run(
            [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=ROOT,
            env=os.environ | environment,
        )
        return done.stdout + done.stderr, done.returncode
    except OSError as error:
        return str(error), 127
    except subprocess.TimeoutExpired:
        return f"longer than {seconds} s", 124


def smi(query):
    text, status = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"], 20)
    return text.strip().splitlines()[0] if status == 0 and text.strip() else None


class Peak(threading.Thread):
    """The most MiB of the card that were in use, looked at ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.1):
            used = smi("memory.used")
            self.largest = max(self.largest, int(used or 0))

    def stop(self):
        self.over.set()
        self.join()
        return self.largest


def last_lines(text, count=6):
    return "\n".join(text.strip().splitlines()[-count:])


def run_tests(binary, rehearsed):
    """The carried tests on the card; of a rehearsal, those whose name contains `rehearsed`."""
    environment = {} if REHEARSAL else {"NIBBLE_TEST_DEVICE": "cuda"}
    arguments = [CARRIED / binary, "--test-threads", "1"] + ([rehearsed] if REHEARSAL else [])
    text, status = run(arguments, 100, RUST_BACKTRACE="0", **environment)
    found = re.search(r"(\d+) passed; (\d+) failed", text)
    passed, failed = map(int, found.groups()) if found else (0, 0)
    ok = status == 0 and passed > 0 and (REHEARSAL or "skipped:" not in text)
    return {"passed": passed, "failed": failed, "ok": ok, "output": "" if ok else last_lines(text, 40)}


def sanitize():
    """One golden model forward and backward under compute-sanitizer, where the toolkit has it."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if REHEARSAL or not Path(tool).exists():
        return {"ran": False, "why": "rehearsal" if REHEARSAL else "compute-sanitizer is not installed"}
    test = [CARRIED / "cuda_backend", "--exact", "every_lora_gradient_matches_autograd_on_a_4_bit_base"]
    arguments = [tool, "--error-exitcode", "9", *test]
    text, status = run(arguments, 60, RUST_BACKTRACE="0", NIBBLE_TEST_DEVICE="cuda")
    return {"ran": True, "ok": status == 0, "output": "" if status == 0 else last_lines(text, 40)}


def write_tokenizer(folder, size):
    vocabulary = {f"w{i}": i for i in range(size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def make_model(folder):
    dense, packed = folder / "dense", folder / "nf4"
    text, status = run(
        [sys.executable, "scripts/make_checkpoint.py", dense, "--preset", PRESET], 120
    )
    if status:
        raise RuntimeError(f"make_checkpoint.py: {last_lines(text)}")
    write_tokenizer(dense, VOCABULARY)
    text, status = run([CARRIED / "nibble", "quantize", "--model", dense, "--out", packed], 150)
    if status:
        raise RuntimeError(f"nibble quantize: {last_lines(text)}")
    source = random.Random(3)
    rows = folder / "rows.jsonl"
    with open(rows, "w") as file:
        for _ in range(STEPS):
            ids = [source.randrange(3, VOCABULARY) for _ in range(LENGTH)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return dense, packed, rows


def train_nibble(folder, packed, rows, activations):
    out = folder / f"run-{activations}"
    peak = Peak()
    peak.start()
    text, status = run(
        [CARRIED / "nibble", "train", "--model", packed, "--data", rows, "--out", out]
        + ["--device", DEVICE, "--max-length", LENGTH, "--per-device-train-batch-size", 1]
        + ["--max-steps", STEPS, "--activations", activations, "--learning-rate", "1e-4"]
        # Attention of random weights learns too slowly for the checks of the first steps.
        + ["--logging-steps", 1, "--memory-budget", "23.5GiB", "--self-checks", "false"],
        150,
    )
    used = peak.stop()
    if status:
        return {"ok": False, "output": last_lines(text)}
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["tokens_per_second"] for entry in log if entry["event"] == "step"]
    planned = re.search(r"memory: planned ([^\n]*)", text)
    return {
        "ok": len(rates) > WARM_UP,
        "tokens_per_second": statistics.median(rates[WARM_UP:]) if len(rates) > WARM_UP else None,
        "memory": planned.group(1) if planned else None,
        "peak_mib": used or None,
    }


PEER = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
model, rows, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(model, quantization_config=four_bit,
    dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0})
model.config.use_cache = False
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0,
    target_modules="all-linear", task_type="CAUSAL_LM"))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
model.train()
rates = []
for line in open(rows).read().splitlines()[:steps]:
    ids = torch.tensor([json.loads(line)["input_ids"]], device="cuda")
    torch.cuda.synchronize(); begun = time.monotonic()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step(); optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize(); rates.append(ids.numel() / (time.monotonic() - begun))
print("RESULT " + json.dumps({"rates": rates, "peak": torch.cuda.max_memory_reserved()}))
"""

RATE = """
import time, torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
best = 0.0
for _ in range(20):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(); a @ b; end.record(); torch.cuda.synchronize()
    best = max(best, 2 * 8192**3 / begin.elapsed_time(end) / 1e9)
print("RESULT %.1f" % best)
"""


def train_peer(dense, rows):
    missing = [name for name in ("transformers", "peft", "bitsandbytes") if not importlib.util.find_spec(name)]
    if REHEARSAL or missing:
        return {"ran": False, "why": "rehearsal" if REHEARSAL else f"not installed: {', '.join(missing)}"}
    text, status = run([sys.executable, "-c", PEER, dense, rows, STEPS], 150)
    found = re.search(r"RESULT (.*)", text)
    if status or not found:
        return {"ran": False, "why": last_lines(text)}
    result = json.loads(found.group(1))
    rate = statistics.median(result["rates"][WARM_UP:])
    return {"ran": True, "tokens_per_second": rate, "peak_mib": result["peak"] >> 20}


SDPA = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
tokens = %d
q = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2))
best = float("inf")
with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.backward(out.detach())
        end.record(); torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
print("RESULT %%.4f" %% best)
"""


def kernel_speed():
    """Widening beside a copy, attention beside PyTorch's flash kernels, in one call."""
    environment = {} if REHEARSAL else {"NIBBLE_TEST_DEVICE": "cuda"}
    arguments = [CARRIED / "cuda_backend", "--exact", "speed::of_kernels", "--nocapture"]
    text, status = run(arguments, 60, RUST_BACKTRACE="0", **environment)
    found = re.search(r"SPEED (\{.*\})", text)
    if status or not found:
        return {"ok": False, "output": last_lines(text)}
    speed = json.loads(found.group(1)) | {"ok": True}
    if not REHEARSAL:
        text, _ = run([sys.executable, "-c", SDPA % speed["attention_tokens"]], 60)
        found = re.search(r"RESULT (.*)", text)
        speed |= {"sdpa_ms": float(found.group(1))} if found else {"sdpa": last_lines(text)}
    return speed


def loss_curves(folder):
    """200 steps of a tiny model on the card and on the CPU: the largest relative difference."""
    dense, rows = folder / "tiny", folder / "tiny.jsonl"
    text, status = run([sys.executable, "scripts/make_checkpoint.py", dense, "--preset", "tiny"], 30)
    if status:
        return {"ok": False, "output": last_lines(text)}
    write_tokenizer(dense, 512)
    source = random.Random(5)
    with open(rows, "w") as file:
        for _ in range(64):
            first = source.randrange(3, 400)
            ids = [first + (7 * i) % 100 for i in range(48)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    curves = []
    for device in (DEVICE, "cpu"):
        out = folder / f"tiny-{device}-{len(curves)}"
        text, status = run(
            [CARRIED / "nibble", "train", "--model", dense, "--data", rows, "--out", out]
            + ["--device", device, "--max-steps", 20 if REHEARSAL else 200, "--logging-steps", 1]
            + ["--max-length", 128, "--per-device-train-batch-size", 4, "--learning-rate", "1e-3"],
            90,
        )
        if status:
            return {"ok": False, "output": last_lines(text)}
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves.append([entry["loss"] for entry in log if entry["event"] == "step"])
    differences = [abs(a / b - 1) for a, b in zip(*curves)]
    largest = max(differences)
    return {"ok": largest < 0.005, "steps": len(differences), "largest_difference": largest,
            "losses": curves, "output": "" if largest < 0.005 else f"losses differ by {largest:.2%}"}


def matrix_rate():
    if REHEARSAL:
        return None
    found = re.search(r"RESULT (.*)", run([sys.executable, "-c", RATE], 60)[0])
    return float(found.group(1)) if found else None


def measure(folder):
    tests = {
        "tests of the kernels": run_tests("cuda_kernels", "norm"),
        "tests of the backend": run_tests("cuda_backend", "logits_and_loss"),
    }
    results = {"tests": tests, "sanitizer": sanitize(), "cublas_tflops": matrix_rate()}
    results |= {"kernels": kernel_speed(), "curves": loss_curves(folder)}
    try:
        dense, packed, rows = make_model(folder)
    except RuntimeError as error:
        results["nibble"] = {"checkpoint": {"ok": False, "output": str(error)}}
        results["peer"] = {"ran": False, "why": "there is no model"}
        return results
    results["nibble"] = {
        activations: train_nibble(folder, packed, rows, activations)
        for activations in ("checkpoint", "auto")
    }
    results["peer"] = train_peer(dense, rows)
    return results


def kernel_rows(speed):
    if not speed["ok"]:
        return ["| kernels | | | FAILED |"]
    widened, copied = speed["dequantize_gb_per_s"], speed["copy_gb_per_s"]
    note = f"{widened:,.0f} GB/s, {widened / copied:.0%} of a copy ({copied:,.0f} GB/s)"
    rows = [f"| dequantize | | | {note}; goal 85 % |"]
    flash, tokens = speed["attention_ms"], speed["attention_tokens"]
    note = f"{flash:.2f} ms forward and backward, {tokens} tokens"
    if "sdpa_ms" in speed:
        note += f": {speed['sdpa_ms'] / flash:.0%} of PyTorch's flash speed ({speed['sdpa_ms']:.2f} ms); goal 50 %"
    return rows + [f"| attention, 32 heads of 128, 8 for keys | | | {note} |"]


def curve_rows(curves):
    if "steps" not in curves:
        return ["| losses beside the CPU | | | FAILED |"]
    verdict = "" if curves["ok"] else "FAILED: "
    note = f"{verdict}{curves['steps']} steps of a tiny model within {curves['largest_difference']:.3%}; goal 0.5 %"
    return [f"| losses beside the CPU | | | {note} |"]


def table(results):
    number = lambda value: "-" if value is None else f"{value:,.0f}"
    peer, sanitizer = results["peer"], results["sanitizer"]
    lines = ["| | tokens/s | peak MiB | |", "|---|---|---|---|"]
    for name, tests in results["tests"].items():
        verdict = "all passed" if tests["ok"] else "FAILED"
        lines.append(f"| {name} | | | {tests['passed']} passed, {tests['failed']} failed: {verdict} |")
    clean = "no error" if sanitizer.get("ok") else "FAILED"
    note = clean if sanitizer["ran"] else f"NOT RUN: {sanitizer['why']}"
    lines.append(f"| compute-sanitizer | | | {note} |")
    lines += kernel_rows(results["kernels"]) + curve_rows(results["curves"])
    for name, row in results["nibble"].items():
        note = (row.get("memory") or "") if row["ok"] else "FAILED: " + row.get("output", "").replace("\n", " / ")
        rate, peak = number(row.get("tokens_per_second")), number(row.get("peak_mib"))
        lines.append(f"| Nibble, activations {name} | {rate} | {peak} | {note} |")
    if peer["ran"]:
        rate, peak = number(peer["tokens_per_second"]), number(peer["peak_mib"])
        lines.append(f"| PEFT + bitsandbytes, checkpointing | {rate} | {peak} | |")
    else:
        lines.append(f"| PEFT + bitsandbytes | | | NOT RUN: {peer['why']} |")
    if results["cublas_tflops"]:
        lines.append(f"| cuBLAS 8192³ bf16 | | | {results['cublas_tflops']:.0f} TFLOP/s |")
    return "\n".join(lines)


def main():
    begun = time.monotonic()
    card = "rehearsal on the CPU" if REHEARSAL else smi("name") or "unknown"
    folder = Path(tempfile.mkdtemp(prefix="gpu_check-", dir=os.environ.get("TMPDIR")))
    try:
        results = measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results |= {"card": card, "driver": smi("driver_version"), "model": PRESET, "length_tokens": LENGTH}
    results["seconds"] = round(time.monotonic() - begun)
    stages = [*results["tests"].values(), *results["nibble"].values(), results["sanitizer"]]
    stages += [results["kernels"], results["curves"]]
    passed = all(stage.get("ok", True) for stage in stages)
    results["passed"] = passed
    title = f"{card}: {PRESET} shape, random weights, {LENGTH} tokens, r 16 on all linears"
    text = table(results)
    if not REHEARSAL:
        name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        stem = ROOT / "docs/benchmarks" / f"gpu-{name}"
        verdict = "passed" if passed else "FAILED"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        stem.with_suffix(".md").write_text(f"# {title}\n\nscripts/gpu_check.sh: {verdict}\n\n{text}\n")
    for stage in stages:
        if stage.get("output"):
            print(stage["output"], end="\n\n")
    kind = "REHEARSAL, NOT A GPU RESULT" if REHEARSAL else "GPU CHECK"
    print(f"{kind}: {'PASSED' if passed else 'FAILED'} in {results['seconds']} s\n\n{title}\n\n{text}")
    sys.exit(0 if passed else 1)


main()
