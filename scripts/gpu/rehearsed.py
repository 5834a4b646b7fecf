"""Stands in for torch_rates.py and peer.py where there is no PyTorch: lines of the same form;
and for nvidia-smi.

    python rehearsed.py rates | peer | card
"""

import json
import sys
import time

RATES = [{"cublas_tflops": 1e-3}, {"copy_gb_per_s": 10.0}, {"attention_ms": 1e-3}]
PEER = {"tokens_per_second": 1.0, "losses": [6.0, 6.0], "allocated_bytes": 1, "reserved_bytes": 1}
WAYS = [("lean", 32), ("lean", 16), ("stock", 32)]
# At work, idle, and one line that a card cut short; power is what it does not tell.
CARD = ["1500, [N/A], 40, 2000, 100", "300, [N/A], 41, 1000, 0", "15"]

if sys.argv[1] == "rates":
    for rate in RATES:
        print("RATE " + json.dumps(rate))
elif sys.argv[1] == "peer":
    for way, tokens in WAYS:
        print("PEER " + json.dumps({"way": way, "tokens": tokens, "card_bytes": 1 << 30} | PEER))
else:
    while True:
        for sample in CARD:
            print("2026/01/01 00:00:00.000, " + sample)
        time.sleep(0.1)
