"""Greedy answers to many prompts: prompts go in as packed rows, answers grow together, each its own length.

Short answers don't wait for long ones: an answer that ends leaves its slot, and once there is room for another row of
prompts it goes in. A step computes one token of each answer that is not at its end, and nothing else.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mmpeft.data.encode import Encoded
from mmpeft.evaluation.prompt_row import PromptRow, lay_out
from mmpeft.families.registry import family_of, trained_model
from mmpeft.models.base import base_of
from mmpeft.models.slots import Slots
from mmpeft.models.tree_attention import row_obstacle, tree_attention_on

_AT_REST: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}
"""Settings of a model's generation config that change greedy answers, and the values at which they don't."""


def obstacle(model: Any) -> str | None:
    """Why a model's prompts cannot share a row with the same answers; None if they can."""
    config = model.generation_config
    settings = [
        name for name, rest in _AT_REST.items() if (value := getattr(config, name, None)) is not None and value != rest
    ]
    if trained_model(model) is not model:
        return f"prompts of the family {family_of(model).name} cannot share a row"
    found = row_obstacle(model, "prompts")
    if found is None and settings:
        found = f"its generation config sets {', '.join(settings)}"
    elif found is None and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)):
        found = "its weights are spread over processes, which have to run in step"
    return found


@dataclass
class Work:
    """What answering has computed.

    Attributes:
        prompts: tokens of prompts that went through the model.
        padded: that padded batches of the same prompts hold, those of like length in one.
        steps: forwards that gave a token to each answer in the making.
        answers: tokens that those steps computed.
    """

    prompts: int = 0
    padded: int = 0
    steps: int = 0
    answers: int = 0

    @classmethod
    def total(cls, shares: Sequence["Work"]) -> "Work":
        """What several processes have computed."""
        return cls(**{each.name: sum(getattr(share, each.name) for share in shares) for each in fields(cls)})

    @property
    def spared(self) -> dict[str, float]:
        """Tokens of prompts that did not have to be computed."""
        return {"tokens": self.padded - self.prompts}


@dataclass
class _Answer:
    """An answer in the making, to the prompt `number`.

    Attributes:
        said: prompt and answer, where a repetition penalty asks for them; else the answer alone.
        begin: where the answer begins in `said`.
        position: of the next token.
    """

    number: int
    position: int
    said: list[int] = field(default_factory=list)
    begin: int = 0


class Decoder:
    """Greedy answers of a model without an `obstacle`, in eval mode.

    Args:
        groups: numbers of questions, those that share their beginning together; longest first.
        encode: the prompts of some of them.
        ends: tokens that end an answer.
        max_new_tokens: an answer's longest length in tokens.
        batch_size: answers in the making at once.
        finish: called with the answers that a step ended: each question's number and its answer's tokens, the ending
            one left out.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        groups: Iterable[Sequence[int]],
        encode: Callable[[Sequence[int]], list[Encoded]],
        ends: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
        finish: Callable[[list[tuple[int, list[int]]]], None],
    ) -> None:
        self.model, self.processor, self.encode, self.finish = model, processor, encode, finish
        self.ends, self.max_new_tokens, self.batch_size = frozenset(ends), max_new_tokens, batch_size
        self.groups = deque(
            list(group[start : start + batch_size]) for group in groups for start in range(0, len(group), batch_size)
        )
        count = min(batch_size, sum(map(len, self.groups)))
        self.slots = Slots(layers=model.config.get_text_config().num_hidden_layers, count=count)
        self.answers: list[_Answer] = []
        self.tokens: list[int] = []
        self.lengths: list[int] = []
        self.work = Work()
        base: Any = base_of(model)
        self.axes = 3 if family_of(base).positions == "media" else 1
        penalty = getattr(model.generation_config, "repetition_penalty", None) or 1.0
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None

    def run(self) -> None:
        """Answer all questions."""
        with tree_attention_on(self.model):
            while self.groups or self.answers:
                if self.groups and self._has_room():
                    self._take_in()
                else:
                    self._step()
        self.work.padded = padded_tokens(self.lengths, self.batch_size)

    def _has_room(self) -> bool:
        # A row of few prompts keeps the machine as badly busy as a step of few answers.
        room = self.slots.count - len(self.answers)
        return not self.answers or room >= max(len(self.groups[0]), self.slots.count // 2)

    def _take_in(self) -> None:
        room = self.slots.count - len(self.answers)
        numbers: list[int] = []
        while self.groups and len(numbers) + len(self.groups[0]) <= room:
            numbers += self.groups.popleft()
        prompts = self.encode(numbers)
        row = lay_out(self.model, self.processor, prompts)
        self.slots.fill(row.index, row.lengths)
        logits = self._logits(row)
        self.work.prompts += row.tokens
        self.lengths += row.lengths
        new = [
            _Answer(number=numbers[place], position=position)
            for place, position in zip(row.order, row.following.tolist(), strict=True)
        ]
        if self.penalty is not None:
            for answer, place in zip(new, row.order, strict=True):
                answer.said = prompts[place]["input_ids"].tolist()
                answer.begin = len(answer.said)
        self.answers += new
        self._say(new, logits)

    def _logits(self, row: PromptRow) -> torch.Tensor:
        """[prompts, vocabulary] behind each prompt."""
        inputs = placed(row.inputs, self.model)
        logits = self.model(**inputs, cache=self.slots.cache, use_cache=True).logits[0]
        return logits if "logits_to_keep" in inputs else logits[row.last.to(logits.device)]

    def _step(self) -> None:
        device = next(self.model.parameters()).device
        positions = torch.tensor([[answer.position] for answer in self.answers], device=device)
        for answer in self.answers:
            answer.position += 1
        logits = self.model(
            input_ids=torch.tensor(self.tokens, device=device)[:, None],
            position_ids=positions if self.axes == 1 else positions.expand(self.axes, -1, -1),
            cache=self.slots.cache,
            seen=self.slots.advance(),
            use_cache=True,
        ).logits[:, -1]
        self.work.steps += 1
        self.work.answers += len(self.answers)
        self.tokens = []
        self._say(self.answers, logits)

    def _say(self, speakers: Sequence[_Answer], logits: torch.Tensor) -> None:
        """The next token of each speaker; those at their end leave."""
        if self.penalty is not None:
            # Filled up with a token of its own, which is punished once however often it stands there.
            longest = max(len(answer.said) for answer in speakers)
            said = [answer.said + [answer.said[0]] * (longest - len(answer.said)) for answer in speakers]
            logits = self.penalty(torch.tensor(said, device=logits.device), logits.float())
        chosen = logits.argmax(dim=-1).tolist()
        self.tokens += chosen
        first = len(self.answers) - len(speakers)
        ended = []
        for slot, (answer, token) in enumerate(zip(speakers, chosen, strict=True), start=first):
            if token not in self.ends:
                answer.said.append(token)
            if token in self.ends or len(answer.said) - answer.begin == self.max_new_tokens:
                ended.append(slot)
        if ended:
            answers = [self.answers[slot] for slot in ended]
            self.finish([(answer.number, answer.said[answer.begin :]) for answer in answers])
            order = self.slots.drop(ended)
            self.answers = [self.answers[slot] for slot in order]
            self.tokens = [self.tokens[slot] for slot in order]


def padded_tokens(lengths: Sequence[int], batch_size: int) -> int:
    """Tokens of prompts of such lengths in padded batches, those of like length in one."""
    ordered = sorted(lengths, reverse=True)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return sum(len(batch) * batch[0] for batch in batches)


def placed(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A batch on the model's device, its numbers in the model's precision."""
    parameter = next(model.parameters())
    return {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in batch.items()
    }
