import pytest
from transformers import AutoProcessor

from mmpeft import get_peft_model, save_adapter
from tests.methods.test_checkpoint import load, shake
from tests.project import write_base


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def trained(base, tmp_path):
    """Makes a trained adapter under a name; returns its directory and the model that has it."""

    def make(name, train, *, seed=1, **options):
        model = shake(get_peft_model(load(base), train), seed)
        path = save_adapter(model, tmp_path / name, processor=AutoProcessor.from_pretrained(base), **options)
        return path, model

    return make
