"""Writes to so many GiB of memory, or as much as can be had, and gives them back."""

import mmap
import sys

PIECE = 1 << 30

pieces = []
try:
    for _ in range(int(sys.argv[1])):
        piece = mmap.mmap(-1, PIECE)
        for page in range(0, PIECE, mmap.PAGESIZE):
            piece[page] = 1
        pieces.append(piece)
except (MemoryError, OSError):
    pass
print(f"touched {len(pieces)} GiB")
