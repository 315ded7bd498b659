"""A tokenizer as keys of a GGUF file: llama.cpp splits text by itself, and has to split it as the model was taught.

Byte-level BPE is what is written. How text is cut before merges apply is a name in GGUF, for which llama.cpp has
patterns (src/llama-vocab.cpp); the name is found by the tokenizer's own patterns, and an unknown one is refused: a
model whose text is split otherwise still talks, and worse.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmpeft.core.errors import ModelError
from mmpeft.export.gguf_file import gguf_package

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PATTERNS: Mapping[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", "bytes"): "qwen2",
    (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes"): "llama-bpe",
}
"""Names of llama.cpp by the steps that cut text: a pattern, single digits, GPT-2's pattern, or bytes alone."""


def add_words(writer: Any, tokenizer: Any, *, rows: int, template: str | None, ends: Sequence[int]) -> None:
    """Write a tokenizer's keys.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer.
        rows: of the embeddings: tokens that the tokenizer lacks are written as unused.
        template: of conversations, as Jinja.
        ends: tokens that end an answer; the first is the tokenizer's own.

    Raises:
        ModelError: the tokenizer is none that llama.cpp knows.
    """
    package = gguf_package()
    backend = _backend(tokenizer)
    tokens, kinds = _tokens(tokenizer, rows, package.TokenType)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(backend, type(tokenizer).__name__))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(_merges(backend["model"]["merges"], type(tokenizer).__name__))
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, ends[0] if ends else None),
        (writer.add_eot_token_id, ends[1] if len(ends) > 1 else None),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    # What the tokenizer itself puts around a text: nothing, or the token that begins it.
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(around[-1] == tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(template)


def pre_tokenizer(backend: Mapping[str, Any], name: str) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts text.

    Args:
        backend: content of its tokenizer.json.
        name: what it is called in messages.

    Raises:
        ModelError: there is none.
    """
    first = backend.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    found = PATTERNS.get(tuple(_step(step) for step in steps))
    normalizer = (backend.get("normalizer") or {}).get("type")
    if found is None or normalizer not in (None, "NFC"):
        raise ModelError(
            f"{name}: llama.cpp has no name that mmpeft knows for the way in which it cuts text "
            f"({json.dumps(first, ensure_ascii=False)[:200]}); known are {', '.join(PATTERNS.values())}"
        )
    return found


def _step(step: Mapping[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt2" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step.get("pattern", {}).get("Regex"))
    return f"{kind}: unknown"


def _backend(tokenizer: Any) -> Any:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    backend = json.loads(fast.to_str()) if fast is not None else {}
    model = backend.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelError(
            f"{type(tokenizer).__name__}: it is no byte-level BPE tokenizer, and only those are written as GGUF"
        )
    return backend


def _merges(merges: Sequence[Any], name: str) -> list[str]:
    if not merges:
        raise ModelError(f"{name}: it has no merges, without which llama.cpp reads no BPE tokenizer")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _tokens(tokenizer: Any, rows: int, kinds: Any) -> tuple[list[str], list[int]]:
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    if max(words) >= rows:
        raise ModelError(
            f"{type(tokenizer).__name__}: it has {max(words) + 1} tokens and the model {rows}: they do not "
            "belong together"
        )
    added = tokenizer.added_tokens_decoder
    found: list[tuple[str, int]] = []
    for number in range(rows):
        if number not in words:
            found.append((f"[PAD{number}]", kinds.UNUSED))
        elif number not in added:
            found.append((words[number], kinds.NORMAL))
        else:
            found.append((words[number], kinds.CONTROL if added[number].special else kinds.USER_DEFINED))
    return [word for word, _ in found], [kind for _, kind in found]
