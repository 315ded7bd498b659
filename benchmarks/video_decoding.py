"""Decoding the frames of a film that are used: mmpeft's loader against transformers' default one, same frames.

    python benchmarks/video_decoding.py [--rounds 7]

Makes a film (H.264, 30 s, 640 x 360, 30 frames a second, a key frame every 2 s), decodes it by both in turn, and
compares the frames. Writes benchmarks/results/video_decoding.json and prints a table in Markdown. The figure to
trust is the ratio: the two are measured in turn, so that a busy machine slows both.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from mmpeft.data.video import load_video
from mmpeft.pipeline.facts import hardware

# After mmpeft, which makes a CUDA build of torchvision importable beside a CPU build of torch.
from transformers import video_utils  # isort: skip

RESULTS = Path(__file__).parent / "results" / "video_decoding.json"
SECONDS, RATE, WIDTH, HEIGHT, KEY_SECONDS = 30, 30, 640, 360, 2
COUNTS = (4, 8, 16, 60)


def make_film(path: Path) -> None:
    """A moving pattern with noise, so that a frame costs what one of a real film does."""
    noise = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    row = np.arange(WIDTH)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(RATE * KEY_SECONDS), "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * RATE):
            wave = (90 + 90 * np.sin((row + 3 * number) / 40)).astype(np.uint8)
            frame = np.roll(noise, number, axis=1) + wave[None, :, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def measure(path: Path, count: int, rounds: int) -> dict[str, Any]:
    """Both loaders in turn, on `count` frames."""
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, video = timed(lambda: load_video(path.name, root=path.parent, fps=None, max_frames=count))
        ours.append(seconds)
        seconds, (frames, metadata) = timed(lambda: video_utils.load_video(str(path), num_frames=count, backend="pyav"))
        theirs.append(seconds)
    if list(video.indices) != [int(index) for index in metadata.frames_indices]:
        raise SystemExit(f"not the same frames: {video.indices} and {list(metadata.frames_indices)}")
    return {
        "frames_used": count,
        "largest_pixel_difference": int(np.abs(video.frames.astype(int) - np.asarray(frames).astype(int)).max()),
        "mmpeft_frames_a_second": round(count / statistics.median(ours), 1),
        "transformers_frames_a_second": round(count / statistics.median(theirs), 1),
        "ratio_median": round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 2),
        "ratio_least": round(min(b / a for a, b in zip(ours, theirs, strict=True)), 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| frames used | mmpeft, frames/s | transformers (pyav), frames/s | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {row['frames_used']} of {SECONDS * RATE} | {row['mmpeft_frames_a_second']} | "
        f"{row['transformers_frames_a_second']} | {row['ratio_median']} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        make_film(path)
        rows = [measure(path, count, options.rounds) for count in COUNTS]
    result = {
        "film": f"H.264, {SECONDS} s, {WIDTH} x {HEIGHT}, {RATE} frames/s, a key frame every {KEY_SECONDS} s",
        "rounds": options.rounds,
        "rows": rows,
        "hardware": hardware(torch.device("cpu")),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table(rows)}\n\n{result['hardware']}\n")


if __name__ == "__main__":
    main()
