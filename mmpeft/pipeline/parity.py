"""Whether a device computes what the CPU computes: the check that somebody with an Ascend NPU runs.

    check                      float32   bfloat16   float16
    linear, norm, attention    ...       ...        ...         outputs, losses and gradients of the CPU, in the same
    LoRA layer                 ...       ...        ...         process and the same precision, beside the device's
    packed rows                ...
    LLaVA step                 ...
    AdamW steps                ...

Weights and inputs come from whole numbers (`numbers_in`), so they are the same bits on every machine and under every
version of torch. A difference is the largest one of a tensor, by the largest magnitude that the CPU's has.

Reduced products (TF32 on NVIDIA, HF32 on Ascend) are switched off meanwhile: it is the kernels that are checked.
"""

import contextlib
import copy
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmpeft.core.errors import ModelError
from mmpeft.core.tree import Segment, Tree
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.models.devices import DTYPES, pick_device
from mmpeft.models.npu_kernels import npu_kernels_on
from mmpeft.models.tree_attention import tree_attention_on
from mmpeft.pipeline.doctor import LIBRARIES, installed
from mmpeft.pipeline.drivers import driver_versions

TOLERANCES = {"float32": 1e-4, "bfloat16": 8e-2, "float16": 1e-2}
"""By precision the largest difference that counts as rounding. What rounding to a precision does to any tensor here,
against float32 on the same CPU, is less than half of it (0.033 and 0.0042 at most); what a wrong mask does is more."""

Found = dict[str, torch.Tensor]
"""By name, what is compared: outputs, losses, gradients."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One check in one precision.

    Attributes:
        check: its name.
        precision: "float32", "bfloat16" or "float16"; the last two by autocast.
        worst: the tensor that differs most.
        absolute: the largest difference of a number in any tensor.
        relative: the largest of a tensor, by the largest magnitude that the CPU's has.
        tolerance: what `relative` may be.
        passed: whether it is; None where the device does not have the precision.
        error: why there is no figure; "" if there is one.
    """

    check: str
    precision: str
    worst: str = ""
    absolute: float | None = None
    relative: float | None = None
    tolerance: float
    passed: bool | None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was found: the report to attach to an issue.

    Attributes:
        device: as torch names it: "npu:0".
        device_name: the product's name.
        versions: of libraries, drivers and toolkits; None where one is not there.
        system: the operating system and the processor's architecture.
        checks: one by one.
    """

    device: str
    device_name: str
    versions: dict[str, str | None]
    system: str
    checks: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return {**asdict(self), "passed": self.passed}


def check_parity(device: str = "npu") -> Parity:
    """Run every check on the CPU and on a device, in each precision.

    Raises:
        ModelError: there is no such device here.
    """
    chosen = pick_device(device)
    if chosen.type == "meta":
        raise ModelError("device 'meta' computes nothing; use npu, cuda or cpu")
    if chosen.type != "cpu" and chosen.index is None:
        chosen = torch.device(chosen.type, 0)
    # What modules draw is written over: the caller's generator is left as it was.
    with exact_products(chosen), torch.random.fork_rng(devices=[]):
        checks = [compare(name, check, precision, chosen) for name, check in CHECKS.items() for precision in TOLERANCES]
    module = torch.get_device_module(chosen)
    return Parity(
        device=str(chosen),
        device_name=platform.processor() or platform.machine()
        if chosen.type == "cpu"
        else module.get_device_name(chosen),
        versions={"python": platform.python_version(), **installed(LIBRARIES), **driver_versions()},
        system=platform.platform(),
        checks=tuple(checks),
    )


def compare(name: str, check: "Check", precision: str, device: torch.device) -> Comparison:
    """What a check gives on the CPU and on a device; whatever the device raises is its result."""
    tolerance = TOLERANCES[precision]
    if precision == "bfloat16" and not _has_bfloat16(device):
        error = "the device has no bfloat16"
        return Comparison(check=name, precision=precision, tolerance=tolerance, passed=None, error=error)
    try:
        expected = check(torch.device("cpu"), DTYPES[precision])
        found = check(device, DTYPES[precision])
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Comparison(check=name, precision=precision, tolerance=tolerance, passed=False, error=text)
    return judge(name, precision, expected, found)


def judge(
    name: str, precision: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> Comparison:
    """The largest differences between what was expected and what was found."""
    absolute, relative, worst = 0.0, -1.0, ""
    for key, reference in expected.items():
        difference = float((found[key].double().cpu() - reference.double()).abs().max())
        scale = float(reference.double().abs().max())
        share = difference / scale if scale else difference
        # A number that is none is the worst there is.
        if not share <= relative:
            relative, worst = share, key
        absolute = difference if not difference <= absolute else absolute
        if difference != difference:
            break
    return Comparison(
        check=name,
        precision=precision,
        worst=worst,
        absolute=absolute,
        relative=relative,
        tolerance=TOLERANCES[precision],
        passed=relative <= TOLERANCES[precision],
    )


def _has_bfloat16(device: torch.device) -> bool:
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return bool(supported()) if supported is not None else True


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """While it lasts, products of float32 are products of float32."""
    module = torch.get_device_module(device)
    places = {
        "cuda": ((torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")),
        "npu": ((getattr(module, "conv", None), "allow_hf32"), (getattr(module, "matmul", None), "allow_hf32")),
    }.get(device.type, ())
    before = [(owner, name, getattr(owner, name)) for owner, name in places if owner is not None]
    try:
        for owner, name, _ in before:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def numbers_in(*shape: int, salt: int) -> torch.Tensor:
    """Float32 numbers between -1 and 1 that look random, by whole numbers alone: Knuth's multiplicative hash, twice."""
    count = int(torch.tensor(shape).prod())
    whole = torch.arange(count, dtype=torch.int64) + 7919 * (salt + 1)
    for _ in range(2):
        # Odd multiplier below 2^31 and factor below 2^32: no product leaves 63 bits.
        whole = (whole * 1_640_531_527) & 0xFFFFFFFF
        whole ^= whole >> 15
    # 24 bits, which float32 holds exactly.
    return ((whole >> 8).double() / 2**23 - 1).float().reshape(shape)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Give every weight a number of its own: matrices by their inputs, norms around one, biases small."""
    for salt, (name, parameter) in enumerate(sorted(module.named_parameters())):
        values = numbers_in(*parameter.shape, salt=salt)
        if parameter.dim() > 1:
            parameter.copy_(values * (3 / parameter[0].numel()) ** 0.5)
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.1 * values)
        else:
            parameter.copy_(0.1 * values)


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _gradients(module: nn.Module) -> Found:
    return {f"gradient of {name}": each.grad for name, each in module.named_parameters() if each.grad is not None}


class Block(nn.Module):
    """Layer norm, projections and causal attention of two heads."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, channels] to the same."""
        split = self.query_key_value(self.norm(states)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        found: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found


def _learn(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Found:
    """Output, loss and gradients of a module that takes [2, 24, 64]."""
    module = module.to(device)
    states = numbers_in(2, 24, 64, salt=1000).to(device).requires_grad_()
    with _autocast(device, dtype):
        out = module(states)
    loss = (out.float() - numbers_in(*out.shape, salt=1001).to(device)).square().mean()
    loss.backward()
    assert states.grad is not None
    return {"output": out.detach(), "loss": loss.detach(), "gradient of the input": states.grad, **_gradients(module)}


def check_block(device: torch.device, dtype: torch.dtype) -> Found:
    """Forward and backward of linear layers, layer norm and attention."""
    module = Block()
    fill(module)
    return _learn(module, device, dtype)


def check_lora(device: torch.device, dtype: torch.dtype) -> Found:
    """Forward and backward of a linear layer with LoRA, as PEFT computes it; both of its matrices filled."""
    module: Any = get_peft_model(nn.Sequential(nn.Linear(64, 48)), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    fill(module)
    return _learn(module, device, dtype)


def check_adamw(device: torch.device, dtype: torch.dtype) -> Found:
    """Three steps of AdamW on given gradients, which are rounded to the precision; weights and states are float32."""
    weight = nn.Parameter(numbers_in(64, 33, salt=0).to(device))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        weight.grad = numbers_in(64, 33, salt=10 + step).to(device, dtype).float()
        optimizer.step()
    return {"weights": weight.detach(), "second moment": optimizer.state[weight]["exp_avg_sq"]}


VOCABULARY, PICTURE_TOKEN, IMAGE_SIZE, PATCH_SIZE = 96, 95, 16, 8


def tiny_llava() -> Any:
    """Two layers of CLIP and two of Llama with 32 channels; weights by `fill`, none trains yet."""
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=16,
    )
    language = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=tower.to_dict(),
        text_config=language.to_dict(),
        image_token_index=PICTURE_TOKEN,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    fill(model)
    return model.requires_grad_(False)


def _texts(rows: int, tokens: int, salt: int) -> torch.Tensor:
    whole = ((numbers_in(rows, tokens, salt=salt).double() + 1) / 2 * (VOCABULARY - 1)).long()
    return whole.clamp(max=VOCABULARY - 2)


def _next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


ROW = Tree(
    segments=(
        Segment(start=0, end=9),
        Segment(start=9, end=14, parent=(0, 9)),
        Segment(start=14, end=19, parent=(0, 9)),
        Segment(start=19, end=30),
    ),
    samples=3,
    tokens=39,
    padded=42,
)
"""Two samples that share what they begin with, and one of its own."""


def check_packed_rows(device: torch.device, dtype: torch.dtype) -> Found:
    """A row of three samples through the tiny model's attention without padding (`mmpeft.models.tree_attention`)."""
    model = tiny_llava().requires_grad_(True).to(device)
    ids = _texts(1, 30, salt=2000).to(device)
    positions = torch.tensor([[*range(14), *range(9, 14), *range(11)]], device=device)
    with tree_attention_on(model), npu_kernels_on(model), _autocast(device, dtype):
        logits = model(input_ids=ids, position_ids=positions, tree=copy.copy(ROW), use_cache=False).logits
    loss = _next_token_loss(logits, ids)
    loss.backward()
    language = model.model.language_model
    return {"logits": logits.detach(), "loss": loss.detach(), **_gradients(language)}


def check_llava_step(device: torch.device, dtype: torch.dtype) -> Found:
    """A step of the tiny LLaVA: projector in full, LoRA on the language model, AdamW, and the loss behind it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    model: Any = get_peft_model(tiny_llava(), config)
    for salt, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if ".lora_" in name:
            parameter.data.copy_(0.2 * numbers_in(*parameter.shape, salt=salt))
        parameter.requires_grad_(".lora_" in name or "projector" in name)
    model = model.to(device).train()
    ids = _texts(2, 20, salt=3000)
    ids[:, 2:6] = PICTURE_TOKEN
    labels = ids.masked_fill(torch.arange(20) < 10, IGNORE_INDEX).to(device)
    batch = {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": numbers_in(2, 3, IMAGE_SIZE, IMAGE_SIZE, salt=3001).to(device),
    }
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3, eps=1e-4)
    found: Found = {}
    for moment in ("before the step", "behind the step"):
        with npu_kernels_on(model), _autocast(device, dtype):
            logits = model(**batch, use_cache=False).logits
        loss = _next_token_loss(logits, labels)
        found[f"loss {moment}"] = loss.detach()
        if moment == "before the step":
            loss.backward()
            found |= {name: each.clone() for name, each in _gradients(model).items()}
            optimizer.step()
    return found


Check = Callable[[torch.device, torch.dtype], Found]

CHECKS: dict[str, Check] = {
    "linear, norm, attention": check_block,
    "LoRA layer": check_lora,
    "packed rows": check_packed_rows,
    "LLaVA step": check_llava_step,
    "AdamW steps": check_adamw,
}
"""By name what is run on the CPU and on the device."""
