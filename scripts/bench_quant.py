#!/usr/bin/env python3
"""The measurements of bench_quant.sh, which says what they are. Standard library only."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (4096, 11008)
PEER = """
import sys, time, torch, bitsandbytes.functional as F
torch.set_num_threads(int(sys.argv[1]))
w = (0.02 * torch.randn(int(sys.argv[2]), int(sys.argv[3]))).to(torch.bfloat16)
for nested in (False, True):
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        best = min(best, time.perf_counter() - start)
    print(2 * w.numel() / best / 1e9)
"""


def output(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def gb_per_s(bytes_, seconds):
    return round(bytes_ / seconds / 1e9, 3)


def blocks(cores):
    command = ["cargo", "bench", "--locked", "-q", "-p", "nibble-quant", "--bench", "blocks", "--"]
    text = output(*command, str(cores), *map(str, SHAPE), cwd=ROOT, stderr=subprocess.DEVNULL)
    return json.loads(text.strip().splitlines()[-1])["gb_per_s"]


def peer(python, cores):
    text = output(python, "-c", PEER, str(cores), *map(str, SHAPE))
    plain, nested = map(float, text.split())
    return {"quantize bf16": round(plain, 4), "quantize bf16, double": round(nested, 4)}


def files(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def size(path):
    return sum(file.stat().st_size for file in files(path))


def forget(path):
    """Drops the files from the system's cache, so that they are read from the disk again."""
    for file in files(path):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path):
    start, buffer = time.perf_counter(), bytearray(1 << 23)
    for file in files(path):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


def write_seconds(path, bytes_):
    start, piece = time.perf_counter(), os.urandom(1 << 23)
    with open(path, "wb", buffering=0) as handle:
        for _ in range(bytes_ // len(piece)):
            handle.write(piece)
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def peak_anonymous(process, peaks):
    """Watches RssAnon, the memory that is no mapped file, every other millisecond."""
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon:"):
                peaks[0] = max(peaks[0], 1024 * int(line.split()[1]))
        time.sleep(0.002)


def quantize(nibble, model, out, cores):
    """Seconds and peak anonymous bytes of `nibble quantize`."""
    command = [nibble, "quantize", "--model", model, "--out", out, "--threads", str(cores), "--json"]
    peaks, start = [0], time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    watch = threading.Thread(target=peak_anonymous, args=(process, peaks))
    watch.start()
    process.communicate()
    seconds = time.perf_counter() - start
    watch.join()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return seconds, peaks[0]


def checkpoint(nibble, work, preset, cores):
    model, out = work / "model", work / "out"
    maker = [sys.executable, ROOT / "scripts/make_checkpoint.py", model, "--preset", preset]
    subprocess.run(maker, check=True, stdout=sys.stderr)
    read, figures = size(model), {}
    for state in ("cold", "warm"):
        if state == "cold":
            forget(model)
            disk = read_seconds(model)
            forget(model)
        else:
            read_seconds(model)
            disk = read_seconds(model)
        seconds, anonymous = quantize(nibble, model, out, cores)
        written = size(out)
        shutil.rmtree(out)
        figures[state] = {
            "seconds": round(seconds, 1),
            "gb_per_s": gb_per_s(read, seconds),
            "plain_read_gb_per_s": gb_per_s(read, disk),
            "plain_write_gb_per_s": gb_per_s(written, write_seconds(work / "plain", written)),
            "peak_anonymous_bytes": anonymous,
        }
    shutil.rmtree(model)
    return {"preset": preset, "bytes_read": read, "bytes_written": written, **figures}


def large_vocabulary(nibble, work, cores):
    model, out = work / "model.gguf", work / "out"
    maker = [sys.executable, ROOT / "scripts/make_checkpoint.py", model, "--gguf"]
    shape = ["--preset", "llama-2-7b", "--layers", "1", "--vocab-size", "128256"]
    subprocess.run(maker + shape, check=True, stdout=sys.stderr)
    seconds, anonymous = quantize(nibble, model, out, cores)
    read = size(model)
    shutil.rmtree(out)
    model.unlink()
    embedding = 4 * 128256 * 4096
    figures = {"gb_per_s": gb_per_s(read, seconds), "seconds": round(seconds, 1)}
    return {**figures, "embedding_bytes_in_f32": embedding, "peak_anonymous_bytes": anonymous}


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores used"


def table(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0])] + lines[1:])


def markdown(result):
    speeds, copy = result["blocks"], max(result["blocks"]["copy"], result["blocks"]["copy in tasks"])
    rows = [("work", "GB/s", "of the copy")]
    rows += [(name, f"{speed:.2f}", f"{speed / copy:.0%}") for name, speed in speeds.items()]
    mib = lambda bytes_: f"{bytes_ / 2**20:.0f} MiB"
    parts = [
        "# Quantizing",
        f"Made by `scripts/bench_quant.sh` at commit {result['commit']} on {result['machine']}.",
        f"## Blocks, {SHAPE[0]} x {SHAPE[1]}, {result['cores']} threads",
        "A copy and a decode count the bytes that they read and write, a quantization those that it reads.",
        table(rows),
    ]
    if result["bitsandbytes"]:
        rows = [("bitsandbytes on the CPU", "GB/s", "Nibble over it")]
        for name, speed in result["bitsandbytes"].items():
            rows.append((name, f"{speed:.3f}", f"{speeds['quantize bf16'] / speed:.0f} times"))
        parts += [table(rows)]
    model = result["checkpoint"]
    rows = [("files", "seconds", "GB/s of input", "plain read", "plain write", "peak anonymous memory")]
    for state, where in (("cold", "on disk"), ("warm", "in the system's cache")):
        f = model[state]
        rows.append((where, f["seconds"], f["gb_per_s"], f["plain_read_gb_per_s"],
                     f["plain_write_gb_per_s"], mib(f["peak_anonymous_bytes"])))
    gguf = result["large_vocabulary"]
    parts += [
        f"## `nibble quantize` of a {model['preset']} shape: {model['bytes_read'] / 1e9:.1f} GB to "
        f"{model['bytes_written'] / 1e9:.1f} GB",
        "Plain read and write (with fsync) of as many bytes by one thread, in GB/s, right before and after.",
        table(rows),
        f"A GGUF file in F16 whose embedding would take {mib(gguf['embedding_bytes_in_f32'])} in f32: peak "
        f"anonymous memory {mib(gguf['peak_anonymous_bytes'])}, {gguf['gb_per_s']} GB/s.",
    ]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="with torch and bitsandbytes")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--preset", default="llama-2-7b")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks")
    arguments = parser.parse_args()
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    nibble, cores = target / "release/nibble", min(2, len(os.sched_getaffinity(0)))
    result = {
        "commit": output("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip(),
        "machine": machine(),
        "cores": cores,
        "blocks": blocks(cores),
        "bitsandbytes": peer(arguments.python, cores) if arguments.python else {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="bench-quant.") as folder:
        result["large_vocabulary"] = large_vocabulary(nibble, Path(folder), cores)
        result["checkpoint"] = checkpoint(nibble, Path(folder), arguments.preset, cores)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quantize.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "quantize.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
