"""Stands in for torch_rates.py and peer.py where there is no PyTorch: lines of the same form.

    python rehearsed.py rates | peer
"""

import json
import sys

RATES = [{"cublas_tflops": 1e-3}, {"copy_gb_per_s": 10.0}, {"attention_ms": 1e-3}]
PEER = {"tokens_per_second": 1.0, "first_loss": 6.0, "allocated_bytes": 1, "reserved_bytes": 1}
WAYS = [("lean", 64), ("lean", 32), ("stock", 64)]

if sys.argv[1] == "rates":
    for rate in RATES:
        print("RATE " + json.dumps(rate))
else:
    for way, tokens in WAYS:
        print("PEER " + json.dumps({"way": way, "tokens": tokens, "card_bytes": 1 << 30} | PEER))
