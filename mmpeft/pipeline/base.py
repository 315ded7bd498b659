"""The model a run starts from: the one the recipe names, or one composed once and kept in the run."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedModel

from mmpeft.config.recipe import ComposeConfig, Recipe
from mmpeft.core.files import read_json
from mmpeft.methods.checkpoint import save_model
from mmpeft.models import load
from mmpeft.models.compose import compose_model
from mmpeft.models.devices import pick_dtype
from mmpeft.models.load import FACTS_NAME
from mmpeft.models.quantized import Quantization
from mmpeft.pipeline.facts import versions

logger = logging.getLogger(__name__)


def resolve_base(recipe: Recipe, folder: Path, input_hash: str) -> str:
    """Model directory or hub id for the first stage.

    A composed model is written to `folder` as an ordinary Hugging Face model, once: on the first process,
    and again only when `input_hash` differs from the one it was made with.
    """
    if not isinstance(recipe.model, ComposeConfig):
        local = Path(recipe.model)
        return str(local.resolve()) if local.is_dir() else recipe.model
    state = PartialState()
    facts = folder / FACTS_NAME
    current = facts.exists() and read_json(facts).get("input_hash") == input_hash
    state.wait_for_everyone()
    if state.is_main_process and not current:
        model, processor = compose_model(
            vision=recipe.model.vision if isinstance(recipe.model.vision, str) else list(recipe.model.vision),
            language=recipe.model.language,
            projector=recipe.model.projector,
            chat_template=recipe.model.chat_template,
            vision_feature_layer=recipe.model.vision_feature_layer,
            seed=recipe.seed,
            trust_remote_code=recipe.trust_remote_code,
        )
        save_model(model, folder, processor=processor, facts=facts_of_composed(recipe, input_hash))
        logger.info("composed %s in %s", type(model).__name__, folder)
    state.wait_for_everyone()
    return str(folder.resolve())


def facts_of_composed(recipe: Recipe, input_hash: str) -> dict[str, Any]:
    """mmpeft.json of a composed model: what it was made of, and with."""
    known = versions()
    composed = recipe.model.model_dump(mode="json") if isinstance(recipe.model, ComposeConfig) else None
    return {"input_hash": input_hash, "mmpeft_version": known["mmpeft"], "composed": composed, "versions": known}


def base_precision(recipe: Recipe, base: str) -> torch.dtype:
    """The precision that a base model is loaded in, on the device of this process."""
    dtype = pick_dtype(recipe.dtype, PartialState().device)
    return dtype if isinstance(dtype, torch.dtype) else stored_precision(recipe, base)


def stored_precision(recipe: Recipe, base: str) -> torch.dtype:
    """The precision of a base model's weights on disk, as its configuration has it."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=recipe.trust_remote_code)
    return config.dtype or torch.float32


def skeleton(base: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model without its weights (on the meta device): enough to count and name its parameters."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    return load.skeleton(config, base, trust_remote_code=trust_remote_code)


def quantization_of(recipe: Recipe) -> Quantization | None:
    """What `load_model` takes."""
    return None if recipe.quantization == "none" else recipe.quantization
