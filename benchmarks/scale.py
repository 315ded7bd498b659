"""What grows with the number of processes, measured as far as one machine can; writes benchmarks/results/scale.json.

python benchmarks/scale.py              # about two minutes on two cores
python benchmarks/scale.py --quick      # the same with small numbers, for tests; name a file with --results

Three kinds of figures: `called` are calls of one process's own code with 10,000 for the number of processes, `started`
are 2, 4 and 8 real processes over gloo, and `computed` follow from these by the formula beside them. docs/scale.md
tells what they mean.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import distributed

from mmpeft.core.hashing import hash_file
from mmpeft.data.balancing import CostBatchSampler, Cut, Steps, fullest_step
from mmpeft.data.batching import GlobalBatchSampler
from mmpeft.data.cutting import Bounds, CostModel
from mmpeft.data.dataset import load_dataset
from mmpeft.data.sample_lengths import LENGTHS
from mmpeft.evaluation.decode import Work
from mmpeft.models.load import load_processor
from mmpeft.pipeline.inputs import data_hash
from mmpeft.training.resume import checkpoint_damage, seal_checkpoint

# Behind mmpeft, which makes a CUDA build of torchvision importable beside CPU torch.
from workload.shapes import make_model  # isort: skip

RESULT = Path(__file__).parent / "results" / "scale.json"
WORLD = 10_000
HOST = 8
"""Processes of a host, for what they share there."""

Row = dict[str, Any]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def in_a_fork(call: Callable[[], Row]) -> Row:
    """What a call finds in a process of its own, with the memory that this process takes for it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = call()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        sender.send({**found, "grown_mib": round(grown / 1024, 1)})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def lengths_of(samples: int) -> np.ndarray:
    """Pictures of 576 tokens, two questions each, with texts as long as those of LLaVA's are about."""
    chance = np.random.default_rng(0)
    lengths = np.zeros(samples, dtype=LENGTHS)
    text = chance.lognormal(4.5, 0.7, samples).clip(20, 1400).astype(int)
    lengths["tokens"], lengths["media"], lengths["shared"] = 576 + text, 576, 590
    lengths["tokens"] = np.maximum(lengths["tokens"], 600)
    lengths["picture"] = lengths["beginning"] = np.arange(samples) // 2 + 1
    return lengths


def plain_batches(samples: int, *, media: bool) -> Row:
    sampler = GlobalBatchSampler(
        length=samples,
        micro=4,
        accumulation=1,
        world=WORLD,
        rank=WORLD - 1,
        seed=0,
        media=(lambda sample: sample // 2 + 1) if media else None,
    )
    batches = iter(sampler)
    first, _ = timed(lambda: next(batches))
    rest, steps = timed(lambda: sum(1 for _ in batches))
    return {
        "samples": samples,
        "first_seconds": round(first, 2),
        "a_later_step_ms": round(1000 * rest / max(1, steps), 3),
    }


def cost_batches(world: int, bounds: Bounds) -> Row:
    """The first step of four samples a process, and how long the fullest of ten steps is looked for."""
    lengths = lengths_of(40 * world)
    share = bounds.packed
    steps = Steps(lengths=lambda _: lengths, samples=len(lengths), size=4 * world, seed=0, share_media=share)
    few = Steps(lengths=lambda _: lengths[: 4 * world], samples=4 * world, size=4 * world, seed=0, share_media=share)
    searched, fullest = timed(lambda: fullest_step(few, bounds, CostModel(), 1)) if bounds.tokens else (None, 0)
    plan = Cut(steps=steps, bounds=bounds, costs=CostModel(), accumulation=int(fullest * 1.1) // world + 1)
    sampler = CostBatchSampler(plan, world=world, rank=world - 1)
    batches = iter(sampler)
    first, _ = timed(lambda: next(batches))
    later, _ = timed(lambda: [next(batches) for _ in range(plan.accumulation)])
    row = {"processes": world, "first_seconds": round(first, 2), "a_later_step_seconds": round(later, 2)}
    return row if searched is None else {**row, "fullest_of_one_step_seconds": round(searched, 2)}


def cached_lengths(samples: int, folder: Path) -> Row:
    path = folder / "lengths.npy"
    np.save(path, lengths_of(samples))

    def opened() -> Row:
        seconds, _ = timed(lambda: int(np.load(path, mmap_mode="r")["tokens"].min()))
        return {"samples": samples, "file_mb": round(path.stat().st_size / 1e6, 1), "open_seconds": round(seconds, 2)}

    return in_a_fork(opened)


def each_process_reads(folder: Path, count: int) -> Row:
    """What every process does for every sample before the first step, on pictures of 64 x 64 on a local disk."""
    make_model("llava", "tiny", folder / "model")
    # Beside everything else, so that it goes with it.
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    processor = load_processor(str(folder / "model"))
    (folder / "pictures").mkdir()
    for number in range(count):
        Image.new("RGB", (64, 64), (number % 256, 0, 0)).save(folder / "pictures" / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a square"}]
    rows = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(count)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")

    def load() -> Any:
        return load_dataset(folder / "data.json", media_root=folder / "pictures", processor=processor)

    load()  # the first process's part: rows are parsed, and kept
    verify, dataset = timed(load)
    hashed, _ = timed(lambda: data_hash(dataset))
    tracemalloc.start()
    keys, _ = timed(lambda: dataset.media_key(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "samples": count,
        "verify_us_a_sample": round(1e6 * verify / count, 1),
        "data_hash_us_a_sample": round(1e6 * hashed / count, 1),
        "media_keys_us_a_sample": round(1e6 * keys / count, 1),
        "media_keys_peak_bytes_a_sample": round(peak / count, 1),
    }


def imports() -> Row:
    probe = (
        "import time, sys; start = time.process_time(); import mmpeft.pipeline.run; print(time.process_time() - start, "
        "len({module.__file__ for module in sys.modules.values() if getattr(module, '__file__', None)}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    seconds, files = done.stdout.split()
    return {"cpu_seconds": round(float(seconds), 2), "files_of_modules": int(files)}


def rng_file(folder: Path) -> Path:
    """What transformers' `_save_rng_state` writes for a process without an accelerator."""
    path = folder / "rng_state_0.pth"
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    torch.save(states, path)
    return path


def checkpoint(folder: Path, processes: int) -> Row:
    """Sealing and proving a checkpoint that has a file of random states for each process, the adapter aside."""
    folder.mkdir()
    content = rng_file(folder).read_bytes()
    for number in range(processes):
        (folder / f"rng_state_{number}.pth").write_bytes(content)
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    sealing, _ = timed(lambda: seal_checkpoint(folder))
    proving, damage = timed(lambda: checkpoint_damage(folder))
    assert damage is None
    return {
        "processes": processes,
        "rng_file_bytes": len(content),
        "seal_seconds": round(sealing, 2),
        "prove_seconds": round(proving, 2),
        "seal_json_mb": round((folder / "seal.json").stat().st_size / 1e6, 2),
    }


def hashing(folder: Path) -> Row:
    """How fast the first process hashes what it seals, out of the page cache."""
    path = folder / "large"
    path.write_bytes(bytes(256 << 20))
    seconds, _ = timed(lambda: hash_file(path))
    return {"mb_a_second": round(path.stat().st_size / 1e6 / seconds)}


def answers(questions: int) -> Row:
    """What evaluation gathers: pairs of a number and an answer of twelve words, and a `Work` a process."""
    share = [(number, "a red house beside the river where children play and swim today") for number in range(questions)]
    size = len(pickle.dumps(share[:: max(1, WORLD)]))
    whole = len(pickle.dumps(share))
    work = len(pickle.dumps([Work.total([])]))
    return {"questions": questions, "bytes_of_a_share": size, "bytes_of_all": whole, "bytes_of_work": work}


def _process(rank: int, world: int, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    begin, _ = timed(
        lambda: distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world
        )
    )
    files = len(os.listdir("/proc/self/fd"))
    distributed.barrier()
    barrier, _ = timed(lambda: [distributed.barrier() for _ in range(20)])
    share = [(number, "a red house beside the river") for number in range(100)]
    output: list[Any] = [None] * world
    gathered, _ = timed(lambda: [distributed.all_gather_object(output, share) for _ in range(5)])
    broadcast, _ = timed(lambda: [distributed.broadcast_object_list([share]) for _ in range(5)])
    if rank == 0:
        queue.put(
            {
                "processes": world,
                "start_seconds": round(begin, 2),
                "open_files_of_the_first": files,
                "barrier_ms": round(1000 * barrier / 20, 2),
                "gather_object_ms": round(1000 * gathered / 5, 2),
                "broadcast_object_ms": round(1000 * broadcast / 5, 2),
            }
        )
    distributed.destroy_process_group()


def processes(world: int, folder: Path) -> Row:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    started = [context.Process(target=_process, args=(rank, world, str(folder), queue)) for rank in range(world)]
    for process in started:
        process.start()
    found: Row = queue.get(timeout=120)
    for process in started:
        process.join()
    return found


def measure(quick: bool) -> Row:
    many = 100_000 if quick else 10_000_000
    world = 100 if quick else WORLD
    rows = Bounds(samples=4, packed=True, share=True)
    budget = Bounds(tokens=8192, packed=True, share=True)
    found: Row = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        seconds, found[name] = timed(call)
        sys.stdout.write(f"{name} ({seconds:.1f} s): {json.dumps(found[name])}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Before anything else has threads: these processes are forked.
        note("started", lambda: [processes(count, folder) for count in ((2,) if quick else (2, 4, 8))])
        note("plain_batches", lambda: in_a_fork(lambda: plain_batches(many, media=False)))
        note("plain_batches_on_shared_media", lambda: in_a_fork(lambda: plain_batches(many // 5, media=True)))
        note("rows_of_four", lambda: [cost_batches(count, rows) for count in (world // 10, world)])
        note("padded_by_four", lambda: [cost_batches(count, Bounds(samples=4)) for count in (world // 10, world)])
        note("rows_by_a_budget", lambda: [cost_batches(count, budget) for count in (world // 10, world)])
        note("cached_lengths", lambda: cached_lengths(many, folder))
        note("each_process_reads", lambda: each_process_reads(folder, 100 if quick else 3_000))
        note("imports", imports)
        note("checkpoint", lambda: checkpoint(folder / "checkpoint-1", world))
        note("hashing", lambda: hashing(folder))
        note("answers", lambda: [answers(count) for count in (10_000, 100_000)])
    return found


def computed(found: Row) -> Row:
    """What 10,000 processes would come to, each by its formula."""
    reads, rng = found["each_process_reads"], found["checkpoint"]["rng_file_bytes"]
    largest = found["answers"][-1]
    million = 1_000_000
    return {
        "verifying_a_million_samples_minutes": {
            "formula": "verify_us_a_sample * 1e6; the first process, and then all others at once",
            "value": round(reads["verify_us_a_sample"] * million / 6e7, 1),
        },
        "files_opened_to_verify_a_million_pictures": {"formula": "processes * pictures", "value": WORLD * million},
        "stats_to_hash_a_million_pictures": {"formula": "processes * pictures", "value": WORLD * million},
        "module_files_opened_at_start": {
            "formula": "processes * files_of_modules",
            "value": WORLD * found["imports"]["files_of_modules"],
        },
        "files_open_in_the_first_process_over_gloo": {
            "formula": "those of 8 processes - 8 + processes",
            "value": found["started"][-1]["open_files_of_the_first"] - found["started"][-1]["processes"] + WORLD,
        },
        "sealing_optimizer_states_of_ten_billion_weights_minutes": {
            "formula": "10e9 weights * 12 bytes (weight, two moments, float32) / mb_a_second, by the first process",
            "value": round(10e9 * 12 / 1e6 / found["hashing"]["mb_a_second"] / 60, 1),
        },
        "rng_mb_of_a_checkpoint": {"formula": "processes * rng_file_bytes", "value": round(WORLD * rng / 1e6, 1)},
        "gathered_mb_in_each_process": {
            "formula": "processes * bytes_of_a_share, for 100,000 questions; shares are padded to the largest",
            "value": round(WORLD * largest["bytes_of_a_share"] / 1e6, 1),
        },
        "order_mb_of_a_host": {
            "formula": f"8 bytes * 10 M samples * {HOST} processes of a host",
            "value": 8 * 10 * HOST,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    begin = time.perf_counter()
    found = measure(options.quick)
    result = {
        "command": "python benchmarks/scale.py" + (" --quick" if options.quick else ""),
        **found,
        "computed": computed(found),
        "seconds": round(time.perf_counter() - begin, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
