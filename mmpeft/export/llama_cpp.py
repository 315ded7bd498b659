"""llama.cpp itself, as the wheel `cyllama` has it compiled: what GGUF files are checked and measured in.

No other module knows the binding. Comments name what cyllama 0.2.18 lacks.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from mmpeft.core.errors import MissingDependencyError, ModelError
from mmpeft.core.files import read_json
from mmpeft.core.optional import require
from mmpeft.export.gguf import MMPROJ

PACKAGE = "--no-deps cyllama"
"""What pip is given. The wheel names no dependencies; if a later one does, none of them is used here."""

_WIDTH = 512
"""Tokens that are taken in at once; llama.cpp's own default."""


@functools.cache
def binding() -> ModuleType:
    """The binding, which says nothing on stderr from now on.

    Raises:
        MissingDependencyError: it is not installed, does not load, or cannot see.
    """
    try:
        native = require("cyllama.llama.llama_cpp", package=PACKAGE)
    except ImportError as error:
        raise MissingDependencyError(
            f"cyllama does not load here ({error}); run: pip install --force-reinstall {PACKAGE}"
        ) from error
    if not hasattr(native, "MtmdContext"):
        raise MissingDependencyError(f"this cyllama takes no pictures; run: pip install --upgrade {PACKAGE}")
    native.disable_logging()
    return native


def version() -> str:
    """Which llama.cpp it is, such as `llama.cpp b9190 (cyllama 0.2.18)`."""
    package = require("cyllama", package=PACKAGE)
    try:
        build = read_json(Path(str(package.__file__)).with_name("build_config.json"))["versions"]["llama_cpp_version"]
    except (OSError, ValueError, KeyError):
        build = "of unknown version"
    return f"llama.cpp {build} (cyllama {package.__version__})"


class LlamaCpp:
    """A model in llama.cpp, on the CPU; what it was told stays until the next `read`.

        cpp = LlamaCpp.of_export("receipts-gguf")
        cpp.answer(f"USER: {cpp.mark} What is the total? ASSISTANT:", [picture], most=16)

    Args:
        model: file of the language model.
        mmproj: file of the tower with projector; without it there are no pictures.
        threads: to compute with.
        room: tokens of a conversation; more is made where one needs it.

    Attributes:
        mark: what stands for a picture in a prompt.

    Raises:
        MissingDependencyError: the binding is not installed.
        ModelError: llama.cpp does not load a file.
    """

    def __init__(self, model: Path, mmproj: Path | None = None, *, threads: int = 1, room: int = 1024) -> None:
        self._native, self._threads = binding(), threads
        self.mark = str(self._native.get_default_media_marker())
        with _handled(lambda why: f"{model}: {version()} does not load it ({why}); export the model again"):
            params = self._native.LlamaModelParams()
            params.n_gpu_layers = 0
            self.model = _model_class()(str(model), params)
            self._eyes = None if mmproj is None else self._opened(mmproj)
        self.words = self.model.get_vocab()
        self._place = 0
        self._make_room(room)

    @classmethod
    def of_export(cls, folder: str | Path, *, threads: int = 1) -> "LlamaCpp":
        """The model in the directory of an export, with its tower.

        Raises:
            MissingDependencyError, ModelError: as the class; there is no language model in the directory.
        """
        found = sorted(Path(folder).glob("model-*.gguf"))
        if not found:
            raise ModelError(f"{folder}: no model-*.gguf there; export a whole model, without --lora")
        return cls(found[0], Path(folder) / MMPROJ, threads=threads)

    def _opened(self, mmproj: Path) -> Any:
        seeing = self._native.MtmdContextParams(use_gpu=False, n_threads=self._threads, warmup=False)
        return self._native.MtmdContext(str(mmproj), self.model, seeing)

    def _make_room(self, tokens: int) -> None:
        params = self._native.LlamaContextParams()
        params.n_ctx = -(-tokens // 256) * 256
        params.n_batch = params.n_ubatch = min(_WIDTH, params.n_ctx)
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._native.LlamaContext(self.model, params)
        self.room = int(params.n_ctx)

    def _begin(self, tokens: int) -> None:
        if tokens > self.room:
            self._make_room(tokens)
        self._context.kv_cache_clear()
        self._place = 0

    def tokens(self, text: str, *, begin: bool = False) -> list[int]:
        """Numbers of a text's tokens, with the one that begins a text if `begin` and the model has it."""
        return list(self.words.tokenize(text, begin, True))

    def read(self, prompt: str, pictures: Sequence[Image.Image] = (), *, begin: bool = False, more: int = 64) -> int:
        """Take in a prompt after forgetting all others.

        Args:
            prompt: with a `mark` for each picture.
            pictures: in the order of their marks; llama.cpp scales and cuts them by itself.
            begin: whether the token that begins a text is put before it, if the model has one.
            more: tokens that will follow.

        Returns:
            How many positions it takes.

        Raises:
            ModelError: llama.cpp does not take the pictures.
        """
        if not pictures:
            ids = self.tokens(prompt, begin=begin)
            self._begin(len(ids) + more)
            self._take(ids, every=False)
            return self._place
        bitmaps = [
            self._native.MtmdBitmap.create_image(*picture.size, picture.convert("RGB").tobytes())
            for picture in pictures
        ]
        if self._eyes is None:
            raise ModelError(f"it was opened without a vision tower, and is given {len(bitmaps)} pictures; give mmproj")
        with _handled(
            lambda why: f"{version()} does not take a prompt with {len(bitmaps)} pictures ({why}): {prompt!r}"
        ):
            chunks = self._eyes.tokenize(prompt, bitmaps, begin, True)
            self._begin(int(chunks.total_tokens) + more)
            self._place = int(self._eyes.eval_chunks(self._context, chunks, 0, 0, _WIDTH, True))
        return self._place

    def _take(self, ids: Sequence[int], *, every: bool) -> list[np.ndarray]:
        """Take in tokens; with `every`, the logits behind each."""
        rows = []
        for start in range(0, len(ids), _WIDTH):
            piece = list(ids[start : start + _WIDTH])
            batch = self._native.llama_batch_get_one(piece, self._place)
            if every:
                batch = self._native.LlamaBatch(n_tokens=len(piece), embd=0, n_seq_max=1)
                batch.set_batch(piece, self._place, True)
            self._context.decode(batch)
            self._place += len(piece)
            rows += [self._row(number) for number in range(len(piece))] if every else []
        return rows

    def _row(self, number: int) -> np.ndarray:
        return np.array(self._context.get_logits_ith(number), dtype=np.float32)

    def logits(self) -> np.ndarray:
        """Of what comes next: [vocabulary]."""
        return self._row(-1)

    def follow(self, ids: Sequence[int]) -> np.ndarray:
        """What it thinks of tokens that follow the prompt, and of each once it knows those before: [ids, vocabulary].

        prompt  a b c | d e f      rows: what comes behind c, d and e
        """
        return np.stack([self.logits(), *self._take(ids[:-1], every=True)])

    def answer(self, prompt: str, pictures: Sequence[Image.Image] = (), *, most: int, begin: bool = False) -> list[int]:
        """The most likely token behind a prompt, time after time, until one that ends an answer."""
        self.read(prompt, pictures, begin=begin, more=most)
        return self.go_on(most)

    def go_on(self, most: int, *, stop: bool = True) -> list[int]:
        """The most likely tokens behind what it has read; the last of them is not taken in.

        Args:
            most: how many, for which `read` was told that there has to be room.
            stop: whether a token that ends an answer ends it.
        """
        sampler = self._native.LlamaSampler(self._native.LlamaSamplerChainParams())
        sampler.add_greedy()
        said: list[int] = []
        while len(said) < most:
            self._take(said[-1:], every=False)
            token = int(sampler.sample(self._context, -1))
            if stop and self.words.is_eog(token):
                break
            said.append(token)
        return said


@contextlib.contextmanager
def _handled(message: Callable[[str], str]) -> Iterator[None]:
    """What fails is a `ModelError` of this message, made from the reason.

    Meanwhile stderr is a file, for a tower's code talks there of every picture and cyllama 0.2.18 has no switch for it;
    the end of it is part of the reason.
    """
    with tempfile.TemporaryFile() as aside:
        kept = os.dup(_STDERR)
        os.dup2(aside.fileno(), _STDERR)
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            aside.seek(0)
            told = aside.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise ModelError(message("; ".join([str(error), *told]))) from error
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)


_STDERR = 2


@functools.cache
def _model_class() -> Any:
    native = binding()

    class Model(native.LlamaModel):  # type: ignore[name-defined]
        """A model that tells its number of tokens, which contexts of cyllama 0.2.18 ask for and it does not."""

        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    return Model
