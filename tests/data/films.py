"""Films and recordings, written by PyAV and soundfile, for the tests of this folder."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def recording(path: Path, seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> Path:
    soundfile.write(path, np.repeat(tone(seconds, rate)[:, None], channels, axis=1), rate)
    return path


def film(
    path: Path,
    *,
    frames: int = 50,
    rate: int = 25,
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    times: list[int] | None = None,
    sound: float = 0.0,
) -> Path:
    """A grey film; frame i has brightness 20 + 4 * i (modulo 200), its top left corner is white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": "10", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        track = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 + 4 * number % 200, np.uint8)
            pixels[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            heard = av.AudioFrame.from_ndarray(tone(sound)[None], format="fltp", layout="mono")
            heard.sample_rate, heard.pts = 16_000, 0
            container.mux(track.encode(heard))
            container.mux(track.encode())
    return path
