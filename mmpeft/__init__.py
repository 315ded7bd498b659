"""Fine-tune multimodal models with adapters, in stages, on the Hugging Face stack.

Names are imported when first used (PEP 562), so that `import mmpeft` costs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmpeft.core.torchvision import make_importable

__version__ = "0.1.0"

_HOME_OF = {
    "AdapterError": "core.errors",
    "DataError": "core.errors",
    "HubError": "core.errors",
    "MMPeftError": "core.errors",
    "MissingDependencyError": "core.errors",
    "ModelError": "core.errors",
    "MultimodalCollator": "data.collate",
    "MultimodalTrainer": "training.trainer",
    "OnnxModel": "export.onnx_model",
    "OutputError": "core.errors",
    "Recipe": "config.recipe",
    "RecipeError": "core.errors",
    "RunInterrupted": "core.errors",
    "RunResult": "pipeline.run",
    "answer": "evaluation.generate",
    "compose_model": "models.compose",
    "evaluate_model": "pipeline.evaluate",
    "export_bnb": "pipeline.export_bnb",
    "export_gguf": "pipeline.export_gguf",
    "export_int8": "pipeline.export_int8",
    "export_onnx": "pipeline.export_onnx",
    "get_peft_model": "methods.attach",
    "load_dataset": "data.dataset",
    "load_model": "models.load",
    "merge": "export.merged_model",
    "push": "pipeline.publish",
    "register_projector": "models.projectors",
    "reproduce": "pipeline.reproduce",
    "run": "pipeline.run",
    "save_adapter": "methods.checkpoint",
}

__all__ = [
    "AdapterError",
    "DataError",
    "HubError",
    "MMPeftError",
    "MissingDependencyError",
    "ModelError",
    "MultimodalCollator",
    "MultimodalTrainer",
    "OnnxModel",
    "OutputError",
    "Recipe",
    "RecipeError",
    "RunInterrupted",
    "RunResult",
    "__version__",
    "answer",
    "compose_model",
    "evaluate_model",
    "export_bnb",
    "export_gguf",
    "export_int8",
    "export_onnx",
    "get_peft_model",
    "load_dataset",
    "load_model",
    "merge",
    "push",
    "register_projector",
    "reproduce",
    "run",
    "save_adapter",
]


make_importable()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mmpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mmpeft.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from mmpeft.config.recipe import Recipe
    from mmpeft.core.errors import (
        AdapterError,
        DataError,
        HubError,
        MissingDependencyError,
        MMPeftError,
        ModelError,
        OutputError,
        RecipeError,
        RunInterrupted,
    )
    from mmpeft.data.collate import MultimodalCollator
    from mmpeft.data.dataset import load_dataset
    from mmpeft.evaluation.generate import answer
    from mmpeft.export.merged_model import merge
    from mmpeft.export.onnx_model import OnnxModel
    from mmpeft.methods.attach import get_peft_model
    from mmpeft.methods.checkpoint import save_adapter
    from mmpeft.models.compose import compose_model
    from mmpeft.models.load import load_model
    from mmpeft.models.projectors import register_projector
    from mmpeft.pipeline.evaluate import evaluate_model
    from mmpeft.pipeline.export_onnx import export_onnx
    from mmpeft.pipeline.publish import push
    from mmpeft.pipeline.reproduce import reproduce
    from mmpeft.pipeline.run import RunResult, run
    from mmpeft.training.trainer import MultimodalTrainer
