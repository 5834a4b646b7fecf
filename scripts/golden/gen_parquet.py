#!/usr/bin/env python3
"""A Parquet file as Hugging Face data sets write them, and the same records as JSONL.

    gen_parquet.py OUT_FOLDER      messages.parquet (and one for each further compression) and
                                   messages.jsonl; needs pyarrow
"""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

RECORDS = [
    {"messages": [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hallo 🤖"}], "source": None},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\nc"}], "source": "x"},
    {"messages": [], "source": "y"},
    {"messages": None, "source": "z"},
] + [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}], "source": "n"}
    for i in range(50)
]


def main():
    out = Path(sys.argv[1])
    table = pyarrow.Table.from_pylist(RECORDS)
    pyarrow.parquet.write_table(table, out / "messages.parquet", row_group_size=20)
    for codec in ["gzip", "lz4", "none", "zstd"]:
        pyarrow.parquet.write_table(table, out / f"messages-{codec}.parquet", compression=codec)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS]
    (out / "messages.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
