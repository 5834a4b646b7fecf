"""Writes to so many GiB of memory and gives them back; fewer, where a limit or the system stands in the way.

Linux promises more memory than there is and ends a process that takes too much: this one, before others.
"""

import mmap
import sys
from pathlib import Path

PIECE = 1 << 30

Path("/proc/self/oom_score_adj").write_text("1000")
limit = Path("/sys/fs/cgroup/memory.max")
limit = limit.read_text().strip() if limit.exists() else "max"
count = int(sys.argv[1])
if limit != "max":
    count = min(count, int(limit) // PIECE - 1)
pieces = []
for _ in range(count):
    piece = mmap.mmap(-1, PIECE)
    for page in range(0, PIECE, mmap.PAGESIZE):
        piece[page] = 1
    pieces.append(piece)
print(f"touched {len(pieces)} GiB")
