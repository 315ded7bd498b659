"""Weights as a stream: what is read is what safetensors holds, what is written transformers loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.export.shards import DTYPES, Checkpoint, shard_bytes, write_shards
from tests.tiny import tiny_llava

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path, processor):
    folder = tmp_path / "base"
    tiny_llava(processor).save_pretrained(folder, max_shard_size="50KB")
    return folder


def everything(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_a_checkpoint_in_shards_is_read_in_the_order_of_its_files(sharded):
    checkpoint = Checkpoint(sharded)
    assert len(checkpoint.files) > 2
    read = list(checkpoint)
    assert equal(dict(read), everything(sharded))
    assert [name for name, _ in read] == list(checkpoint.tensors)
    files = [checkpoint.tensors[name].file for name, _ in read]
    assert files == sorted(files)
    assert checkpoint.bytes == sum(tensor.nbytes for _, tensor in read)
    name = read[-1][0]
    assert torch.equal(checkpoint.read(name), read[-1][1])


def test_every_type_of_number_and_every_shape_comes_back(tmp_path):
    torch.manual_seed(0)
    types = [dtype for dtype in DTYPES.values() if dtype != torch.complex64]
    tensors = {f"t{i}": (torch.rand(3, 5) * 50).to(dtype) for i, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.rand(4, 6).T}
    write_shards(tensors.items(), tmp_path)
    assert equal(dict(Checkpoint(tmp_path)), {name: tensor.contiguous() for name, tensor in tensors.items()})
    assert equal(everything(tmp_path), {name: tensor.contiguous() for name, tensor in tensors.items()})


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (40_000, 4), (1, 63)])
def test_what_is_written_loads_in_transformers(limit, files, sharded, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    where = write_shards(Checkpoint(sharded), out, max_bytes=limit)
    (out / "config.json").write_bytes((sharded / "config.json").read_bytes())
    written = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(written) == files
    assert set(where.values()) == set(written)
    assert (out / INDEX).exists() == (files > 1)
    if files > 1:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == where
        assert index["metadata"]["total_size"] == Checkpoint(sharded).bytes
        assert all(file.endswith(f"-of-{files:05d}.safetensors") for file in written)
    _, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert equal(everything(out), everything(sharded))


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ModelError, match="a came twice"):
        write_shards([("a", torch.zeros(1)), ("a", torch.zeros(1))], tmp_path)


def test_a_shard_that_is_lacking_is_named(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=rf"1 of its \d+ shards are lacking, first {lost.name}"):
        Checkpoint(sharded)


@pytest.mark.parametrize("keep", [4, 30, -1])
def test_a_shard_that_is_cut_short_is_named(keep, sharded):
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"{cut.name}: not a whole safetensors file"):
        Checkpoint(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["made.up"] = sorted(set(index["weight_map"].values()))[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"made.up is not in it, though model.safetensors.index.json says so"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": "../../secret"}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(index, sharded):
    (sharded / INDEX).write_text(index)
    with pytest.raises(ModelError, match="not an index of safetensors shards"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "no", "data_offsets": [0, 8]},
        {"dtype": "F32"},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(entry, tmp_path):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"model.safetensors: not a whole safetensors file"):
        Checkpoint(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled weights can run code"):
        Checkpoint(tmp_path)


def test_the_layout_depends_on_names_and_shapes_alone(tmp_path):
    def layout(**tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path).layout_hash()

    one = layout(a=torch.zeros(2, 3), b=torch.zeros(4))
    assert layout(b=torch.ones(4), a=torch.ones(2, 3, dtype=torch.bfloat16)) == one
    assert layout(a=torch.zeros(3, 2), b=torch.zeros(4)) != one
    assert layout(a=torch.zeros(2, 3), c=torch.zeros(4)) != one


@pytest.mark.parametrize(
    ("text", "found"), [("2GB", 2 * 10**9), ("1.5 MiB", 1572864), ("500kb", 500_000), (7, 7), ("9b", 9)]
)
def test_sizes_of_shards_are_read(text, found):
    assert shard_bytes(text) == found


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2TB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="expected a size such as 2GB"):
        shard_bytes(text)
