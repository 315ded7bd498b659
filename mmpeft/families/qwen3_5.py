"""Qwen3.5 (`Qwen3_5ForConditionalGeneration`): linear attention in three of four layers of the language model.

The linear layers (`linear_attn.in_proj_qkv`, `in_proj_z`, `in_proj_a`, `in_proj_b`, `out_proj`) carry a state from
token to token. Processor and positions are Qwen3-VL's; there are no mergers of earlier layers. Its chat template
asks for thinking unless told otherwise (see `mmpeft.data.chat`).
"""

from mmpeft.families.projecting import qwen_merger
from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="qwen3_5",
    model_types=("qwen3_5",),
    project=qwen_merger,
    parts={
        "vision": ("model.visual",),
        "projector": ("model.visual.merger",),
        "language": ("model.language_model", "lm_head"),
    },
    positions="media",
    modalities=("image", "video"),
    boxes="thousandths",
    note=(
        "Trained on answers without reasoning it is asked with enable_thinking=False, elsewhere too. Its linear "
        "attention is slow without the kernels of flash-linear-attention and causal-conv1d."
    ),
)
