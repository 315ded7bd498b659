"""A model asked: greedy answers, in batches, the same as one by one."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from mmpeft.core.errors import DataError
from mmpeft.core.speed import Speedup
from mmpeft.core.types import Modality
from mmpeft.data.chat import assistant_spans, control_tokens, render_chat
from mmpeft.data.collate import TEXT_ALIGNED, join_media
from mmpeft.data.encode import Encoded, encode_prompt, encode_prompt_turns
from mmpeft.data.expand import picture_length
from mmpeft.data.load_media import MediaLimits, load_media
from mmpeft.data.media import check_image, load_image, to_rgb
from mmpeft.data.roots import is_url, resolve_inside
from mmpeft.data.types import PLACEHOLDERS, WORDS, Media, Question, Turn
from mmpeft.evaluation.decode import Decoder, Work, obstacle, placed
from mmpeft.evaluation.shared_media import SharedMedia
from mmpeft.models.linear_patches import patches_linear
from mmpeft.models.npu_kernels import npu_kernels_on


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers to questions.

    Attributes:
        texts: in the order of the questions, without white space around them.
        sharing: whether questions on the same media ran these once, and the tokens of prompts that it spared.
        work: what was computed.
    """

    texts: list[str]
    sharing: Speedup
    work: Work


def answer_questions(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    media_root: Path,
    limits: MediaLimits | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    share_media: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """The model's greedy answers.

    Questions on the same media run these, and whatever their prompts begin with, once; an answer that ends makes room
    for the next question. The longest questions come first, so that memory runs out at once or not at all.
    The model is in eval mode meanwhile; afterwards each of its modules is in the mode it was in.

    Args:
        media_root: folder of the media.
        limits: how much of each medium is decoded; default: `MediaLimits()`.
        max_new_tokens: an answer's longest length in tokens; it also ends at the model's end-of-turn token.
        batch_size: answers in the making at once.
        share_media: False, or a model that has an obstacle to it, runs each prompt by itself in padded batches.
        on_batch: called with the number of questions answered since the last call.

    Raises:
        DataError: a picture that cannot be read, or a prompt that holds a control token; names the question.
    """
    limits = limits or MediaLimits()
    lengths = [_length(processor, question, media_root) for question in questions]
    answers = [""] * len(questions)
    ends = end_tokens(model, processor)

    def encode(numbers: Sequence[int]) -> list[Encoded]:
        # Those on the same media stand together.
        groups = groupby((questions[number] for number in numbers), key=_media_of)
        return [row for _, group in groups for row in _encode_questions(processor, list(group), media_root, limits)]

    def finish(ended: list[tuple[int, list[int]]]) -> None:
        for number, tokens in ended:
            answers[number] = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if on_batch is not None:
            on_batch(len(ended))

    why = obstacle(model) if share_media else "the recipe switches it off"
    if why is None:
        decoder = Decoder(
            model,
            processor,
            groups=_on_the_same(questions, lengths),
            encode=encode,
            ends=ends,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            finish=finish,
        )
        with _evaluating(model):
            decoder.run()
        work = decoder.work
    else:
        work = Work()
        order = sorted(range(len(questions)), key=lambda index: -lengths[index])
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = encode(chosen)
            tokens = len(rows) * max(len(row["input_ids"]) for row in rows)
            work.prompts, work.padded = work.prompts + tokens, work.padded + tokens
            for index, text in zip(chosen, _generate(model, processor, rows, max_new_tokens), strict=True):
                answers[index] = text
            if on_batch is not None:
                on_batch(len(chosen))
    return Answers(texts=answers, sharing=_sharing(why, work), work=work)


def _sharing(why: str | None, work: Work) -> Speedup:
    return Speedup(
        name="evaluate.share_media",
        on=why is None,
        why=why or "questions on the same media run these once",
        saved={} if why else work.spared,
    )


def _on_the_same(questions: Sequence[Question], lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the questions, those on the same media together, the longest first; without media each alone."""
    groups: dict[object, list[int]] = {}
    for number in sorted(range(len(questions)), key=lambda number: -lengths[number]):
        media = _media_of(questions[number])
        groups.setdefault(media if any(media) else number, []).append(number)
    return list(groups.values())


def _media_of(question: Question) -> tuple[tuple[str, ...], ...]:
    return question.images, question.videos, question.audios


def answer(
    model: Any,
    processor: Any,
    *,
    images: Sequence[str | Path | Image.Image] = (),
    videos: Sequence[str | Path] = (),
    audios: Sequence[str | Path] = (),
    prompt: str,
    limits: MediaLimits | None = None,
    max_new_tokens: int = 128,
) -> str:
    """The model's greedy answer to one prompt about any number of pictures, films and recordings.

    Args:
        images: paths or PIL pictures; they stand before the text, unless the prompt says where by `<image>`.
        videos, audios: paths; as pictures, by `<video>` and `<audio>`.
        prompt: the question.
        limits: how much of each medium is decoded; default: `MediaLimits()`.

    Raises:
        DataError: a picture that cannot be read, a count of `<image>` that is not that of the pictures, or a
            prompt that holds a control token.
    """
    limits = limits or MediaLimits()
    given: dict[Modality, Sequence[Any]] = {"image": images, "video": videos, "audio": audios}
    text = "".join(_placed_before(prompt, modality, len(media)) for modality, media in given.items()) + prompt
    media = Media(
        images=[_picture(image) for image in images],
        videos=[
            video
            for path in map(_local_file, videos)
            for video in load_media(
                Question(id="", prompt=(), reference="", videos=(path.name,)), root=path.parent, limits=limits
            ).videos
        ],
        audios=[
            audio
            for path in map(_local_file, audios)
            for audio in load_media(
                Question(id="", prompt=(), reference="", audios=(path.name,)), root=path.parent, limits=limits
            ).audios
        ],
    )
    row = encode_prompt(processor, [Turn(role="user", text=text)], media)
    return _generate(model, processor, [row], max_new_tokens)[0]


def _placed_before(prompt: str, modality: Modality, count: int) -> str:
    """The placeholders to put before a prompt that holds none of its own."""
    marks = prompt.count(PLACEHOLDERS[modality])
    if marks not in (0, count):
        raise DataError(
            f"the prompt holds {marks} {PLACEHOLDERS[modality]} for {count} {WORDS[modality]}s; "
            f"expected one for each, or none: the {WORDS[modality]}s then stand before the text"
        )
    return "" if marks else PLACEHOLDERS[modality] * count


def _local_file(path: str | Path) -> Path:
    if is_url(str(path)):
        raise DataError(f"{str(path)!r} is a URL, and URLs are off: download it and give its path")
    return Path(path).resolve()


def _picture(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    if is_url(str(image)):
        raise DataError(f"picture {str(image)!r} is a URL, and URLs are off: download it and give its path")
    path = Path(image).resolve()
    return load_image(path.name, root=path.parent)


def _length(processor: Any, question: Question, media_root: Path) -> int:
    """Tokens of a question with its pictures, which are not decoded for it."""
    with _naming(question):
        text = render_chat(processor, question.prompt, add_generation_prompt=True)
        pictures = sum(picture_length(processor, check_image(name, root=media_root)) for name in question.images)
        # Films and recordings are not opened for it: their size on disk says which of them are alike.
        others = sum(
            resolve_inside(name, root=media_root, kind="medium").stat().st_size // 1024
            for name in (*question.videos, *question.audios)
        )
    return len(processor.tokenizer(text, verbose=False)["input_ids"]) + pictures + others


def _encode_questions(
    processor: Any, questions: Sequence[Question], media_root: Path, limits: MediaLimits
) -> list[Encoded]:
    """Prompts of questions on the same media, which are read and processed once."""
    with _naming(questions[0]):
        media = SharedMedia(processor, load_media(questions[0], root=media_root, limits=limits))
    rows = []
    for question in questions:
        with _naming(question):
            # A question whose reference reasons is asked for reasoning, as its sample in training is.
            thinking = "</think>" in question.reference
            rows.append(encode_prompt_turns(processor, question.prompt, media, thinking=thinking))
    return rows


@contextlib.contextmanager
def _naming(question: Question) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"question {question.id!r}: {error}") from error


def end_tokens(model: Any, processor: Any) -> list[int]:
    """Ids of every token that ends an answer.

    They are the model's and the tokenizer's end-of-sequence tokens, and the one that the chat template writes
    behind an assistant's turn, which is none of these in many base models turned chat (`<|im_end|>`, `<|eot_id|>`).
    """
    tokenizer = processor.tokenizer
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    ids += [tokenizer.eos_token_id, _end_of_turn(processor)]
    return sorted({identifier for identifier in ids if identifier is not None})


def _end_of_turn(processor: Any) -> int | None:
    question, reply = Turn(role="user", text="x"), Turn(role="assistant", text="y")
    try:
        text, ((start, end),) = assistant_spans(processor, [question, reply])
    except DataError:
        return None  # A template that rewrites what it wrote before: no end of turn can be told.
    found = control_tokens(processor).pattern.search(text[start:end].partition(reply.text)[2])
    return processor.tokenizer.convert_tokens_to_ids(found.group()) if found else None


def _generate(model: Any, processor: Any, rows: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """Answers to encoded prompts of unequal length, padded on the left so that all answers start together.

    a b p p c d | answer          input_ids of the longest row
    - - e f g h | answer          a shorter one; attention_mask 0 0 1 1 1 1
    """
    tokenizer = processor.tokenizer
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(identifier for identifier in candidates if identifier is not None)
    ends = end_tokens(model, processor)
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=pad, padding_side="left")
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long(),
    }
    for key in sorted({key for row in rows for key in row} & TEXT_ALIGNED):
        values = [row[key] for row in rows]
        batch[key] = pad_sequence(values, batch_first=True, padding_side="left")
    batch |= join_media(rows)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        # The values that greedy decoding ignores in silence; a model's own (temperature 0.7) would be warned of.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    with _evaluating(model):
        output = model.generate(**placed(batch, model), generation_config=config)
    return [_text(tokenizer, row, ends) for row in output[:, ids.shape[1] :].tolist()]


def _text(tokenizer: Any, ids: list[int], ends: Sequence[int]) -> str:
    stop = next((index for index, identifier in enumerate(ids) if identifier in ends), len(ids))
    return tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradients, in one precision, and by the matrix products and kernels of training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), patches_linear(model), npu_kernels_on(model), _one_precision(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _one_precision(model: torch.nn.Module) -> Iterator[None]:
    """Autocast where float32 adapters sit on a base of half precision, whose products they cannot enter."""
    parameter = next(model.parameters())
    mixed = {other.dtype for other in model.parameters() if other.is_floating_point()} - {parameter.dtype}
    if not mixed or parameter.dtype == torch.float32:
        yield
    else:
        with torch.autocast(parameter.device.type, dtype=parameter.dtype):
            yield
