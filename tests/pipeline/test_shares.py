"""Memory of processes that share a model out: each takes its share while the model is read, and not much more."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.processes import environment
from tests.tiny import IMAGE_TOKENS, tiny_clip_config, tiny_processor

LAYERS = 20

READING = """
import sys
import threading

import mmpeft
import torch
from mmpeft.config.recipe import Recipe
from mmpeft.pipeline.run import join_processes
from mmpeft.pipeline.stage import StageStart, prepare_stage
from mmpeft.pipeline.strategy import pick_strategy

base, strategy = sys.argv[1:]
stage = {"name": "one", "train": {"projector": "full", "language": {"r": 4}}, "distributed": strategy}
recipe = Recipe.from_dict({"model": base, "data": {"train": "t"}, "device": "cpu", "stages": [stage]})
state = join_processes(recipe)
pick_strategy(recipe.stages[0])
if strategy == "zero3":
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
torch.distributed.all_reduce(torch.ones(1 << 20))


def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


peak, ended = 0, threading.Event()


def watch():
    global peak
    while not ended.wait(0.003):
        peak = max(peak, own())


before = own()
watching = threading.Thread(target=watch)
watching.start()
prepared = prepare_stage(recipe, recipe.stages[0], StageStart(base=base, carried={}), seed=0)
ended.set()
watching.join()
# Shares of fsdp2 may be pages of the file, as transformers and the system have it. Those that the system maps beside
# them, and takes back when it likes, are not counted; in zero3 the first process maps the whole file so.
with open("/proc/self/maps") as file:
    maps = [line.split()[0].split("-") for line in file if line.rstrip().endswith(".safetensors")]
files = [range(*(int(bound, 16) for bound in bounds)) for bounds in maps]
shares = [weight.to_local() for weight in prepared.model.parameters() if hasattr(weight, "to_local")]
mapped = sum(share.nbytes for share in shares if any(share.data_ptr() in file for file in files))
for process in range(state.num_processes):
    if process == state.process_index:
        print("bytes", peak - before + mapped, flush=True)
    state.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """1.2 GB in float32, nearly all of it in layers."""
    processor = tiny_processor()
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=tiny_clip_config().to_dict(),
        text_config=text.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder, max_shard_size="200MB")
    processor.save_pretrained(folder)
    return folder, sum(weight.nbytes for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_no_process_takes_a_third_more_than_its_share(base, strategy):
    folder, size = base
    script = folder.parent / "reading.py"
    script.write_text(READING)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*words, str(folder), strategy], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("bytes ")]
    assert len(peaks) == 2
    print(f"{strategy}: {[round(peak / (size / 2), 2) for peak in peaks]} of a share")
    assert max(peaks) < 1.3 * size / 2
    assert min(peaks) > 0.9 * size / 2
