"""The model a run starts from: the one the recipe names, or one composed once and kept in the run."""

import logging
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedModel

from mmpeft.config.recipe import ComposeConfig, Recipe
from mmpeft.core.files import read_json
from mmpeft.methods.checkpoint import save_model
from mmpeft.models.compose import compose_model
from mmpeft.models.load import FACTS_NAME, auto_class

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
        save_model(model, folder, processor=processor, facts={"input_hash": input_hash})
        logger.info("composed %s in %s", type(model).__name__, folder)
    state.wait_for_everyone()
    return str(folder.resolve())


def skeleton(base: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model without its weights (on the meta device): enough to count and name its parameters."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return auto_class(config, base).from_config(config, trust_remote_code=trust_remote_code)
