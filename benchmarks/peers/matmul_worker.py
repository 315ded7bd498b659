"""The rate of this machine's matrix product at a model's shapes, all threads: matmul_worker.py WORKLOAD.json

Writes `{"flops_per_second"}`: the best of several repetitions of one layer's products (attention's four projections and
the three of the feed-forward) over as many tokens as a step has.
"""

import json
import sys
import time
from pathlib import Path

import torch

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
device, dtype = torch.device(work["device"]), getattr(torch, work["dtype"])
inputs = [torch.randn(work["tokens"], rows, device=device).to(dtype) for rows, _ in work["products"]]
weights = [torch.randn(rows, columns, device=device).to(dtype) for rows, columns in work["products"]]
once = sum(2 * work["tokens"] * rows * columns for rows, columns in work["products"])


def repeat(count):
    """Seconds of so many repetitions."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        for left, right in zip(inputs, weights, strict=True):
            torch.mm(left, right)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


repeat(3)
count = max(1, round(0.3 / (repeat(3) / 3)))
best = min(repeat(count) for _ in range(5)) / count
Path(work["result"]).write_text(json.dumps({"flops_per_second": once / best}), encoding="utf-8")
