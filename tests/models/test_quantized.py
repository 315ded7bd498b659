"""A language model in 8 or 4 bits: which matrices are so, and that LoRA trains on them."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mmpeft
from mmpeft.cli.main import app
from mmpeft.core.errors import ModelError
from mmpeft.models.quantized import quantizable, quantization_config, spared_bytes
from tests.project import write_base
from tests.tiny import tiny_llava

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

TRAIN = {"projector": "full", "language": {"r": 4}}


def in_bits(model):
    return {
        name.replace(".base_layer", "")
        for name, module in model.named_modules()
        if type(module).__module__.startswith("bitsandbytes") and isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_matrices_of_layers_alone_are_held_so(tmp_path, kind):
    write_base(tmp_path, hidden=64)
    whole, _ = mmpeft.load_model(tmp_path)
    model, _ = mmpeft.load_model(tmp_path, quantization=kind)
    expected = quantizable(whole, kind)
    assert in_bits(model) == expected
    assert all(".language_model.layers." in name for name in expected)
    assert len(expected) == 7 * len(whole.get_decoder().layers)
    assert {weight.dtype for name, weight in model.named_parameters() if "layers" not in name} == {torch.float32}
    ids = torch.arange(3, 24)[None]
    wanted, found = (each(input_ids=ids).logits.detach() for each in (whole, model))
    assert 0 < float((wanted - found).abs().mean()) < 0.2 * float(wanted.std())
    # What it is said to spare is what it spares.
    own, others = (sum(weight.nbytes for weight in each.parameters()) for each in (model, whole))
    scales = {"int8": 0, "nf4": 4 / 64}[kind] * sum(whole.get_submodule(name).weight.numel() for name in expected)
    assert others - own - scales == pytest.approx(spared_bytes(whole, kind, torch.float32), abs=4096)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_lora_trains_on_them_and_loads_on_the_whole_base(tmp_path, kind):
    write_base(tmp_path / "base", hidden=64)
    model, processor = mmpeft.load_model(tmp_path / "base", quantization=kind)
    peft_model = mmpeft.get_peft_model(model, TRAIN).train()
    ids = torch.arange(3, 24)[None]
    optimizer = torch.optim.AdamW([weight for weight in peft_model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    peft_model.eval()
    with torch.no_grad():
        # Answered in the midst of training, it trains on.
        peft_model(input_ids=ids)
    peft_model.train()(input_ids=ids, labels=ids).loss.backward()
    mmpeft.save_adapter(peft_model, tmp_path / "adapter", processor=processor)
    loaded, _ = mmpeft.load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    with torch.no_grad():
        assert loaded(input_ids=ids, labels=ids).loss < losses[0]


def test_what_is_quantized_already_is_refused(tmp_path):
    write_base(tmp_path / "base", hidden=64)
    model, processor = mmpeft.load_model(tmp_path / "base", quantization="int8")
    model.save_pretrained(tmp_path / "int8")
    processor.save_pretrained(tmp_path / "int8")
    with pytest.raises(ModelError, match="is quantized already; leave `quantization` out"):
        mmpeft.load_model(tmp_path / "int8", quantization="nf4")


def test_rows_too_narrow_for_four_bits_stay_whole_with_a_warning(caplog):
    quantization_config(tiny_llava(), "nf4", dtype=None)
    assert "12 matrices of the language model stay whole: their rows are no multiple of 64" in caplog.text
    assert quantizable(tiny_llava(), "nf4") == {
        name for name in quantizable(tiny_llava(), "int8") if name.endswith("down_proj")
    }


def test_adapters_are_asked_on_four_bits_too(tmp_path):
    write_base(tmp_path / "base", hidden=64)
    model, processor = mmpeft.load_model(tmp_path / "base")
    mmpeft.save_adapter(mmpeft.get_peft_model(model, TRAIN), tmp_path / "adapter", processor=processor)
    words = ["generate", str(tmp_path / "adapter"), "--prompt", "hm?", "--max-new-tokens", "3"]
    whole, four = (CliRunner().invoke(app, [*words, "--json", *more]) for more in ([], ["--quantization", "nf4"]))
    assert (whole.exit_code, four.exit_code) == (0, 0)
    assert '"answer"' in four.stdout
    refused = CliRunner().invoke(app, [*words, "--quantization", "nf3"])
    assert refused.exit_code == 2
