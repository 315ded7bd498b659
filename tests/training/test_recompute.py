"""Memory that does not suffice: a micro-batch runs again with more layers recomputed, and gives the same numbers."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from mmpeft import MultimodalCollator, MultimodalTrainer
from mmpeft.data.encode import encode_sample
from mmpeft.models.recomputed import RecomputedLayers
from mmpeft.training.computing import Compute
from mmpeft.training.recompute import ADVICE, Recompute, lacks_memory
from tests.families.models import MODELS
from tests.families.samples import first_medium

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def small(layers=8):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
    )
    return LlamaForCausalLM(config).train()


def step_of(model, tokens=16):
    ids = torch.arange(2 * tokens).view(2, tokens) % 64

    def step():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.item()

    return step


def gradients(model):
    return [weight.grad.clone() for weight in model.parameters()]


def failing_unless_recomputed(layer):
    """A layer for which memory suffices only where it is recomputed."""

    def look(module, args):
        if not module.gradient_checkpointing:
            raise RuntimeError(NO_MEMORY)

    return layer.register_forward_pre_hook(look)


def failing_behind_all_other_gradients(model):
    """A backward whose last gradient finds memory only where layers are recomputed."""

    def fail(gradient):
        if not model.model.layers[0].gradient_checkpointing:
            raise RuntimeError(NO_MEMORY)

    model.model.embed_tokens.weight.register_hook(fail)


def test_a_part_of_the_layers_gives_the_same_gradients_and_is_taken_back():
    model = small()
    step = step_of(model)
    step()
    whole = gradients(model)
    layers = RecomputedLayers(model)
    for count in (3, 8, 1, 0):
        layers.recompute(count)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [True] * count + [False] * (8 - count)
        model.zero_grad()
        step()
        assert all(torch.equal(*pair) for pair in zip(whole, gradients(model), strict=True))
    assert not any("gradient_checkpointing" in vars(layer) for layer in model.model.layers)


def test_layers_are_recomputed_a_quarter_at_a_time_until_memory_suffices(caplog):
    model = small()
    loss = step_of(model)()
    whole = gradients(model)
    model.zero_grad()
    failing_unless_recomputed(model.model.layers[3])
    recompute = Recompute()
    with recompute.watching(model):
        assert recompute.run(step_of(model)) == loss
        assert all(torch.equal(*pair) for pair in zip(whole, gradients(model), strict=True))
    assert (recompute.count, recompute.total) == (4, 8)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert ["2 of 8" in text or "4 of 8" in text for text in caplog.messages] == [True, True]


def test_a_micro_batch_that_runs_again_drops_out_the_same():
    model = small()
    dropout = torch.nn.Dropout(0.5)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: dropout(output))
    torch.manual_seed(1)
    loss = step_of(model)()
    model.zero_grad()
    failing_unless_recomputed(model.model.layers[3])
    recompute = Recompute()
    torch.manual_seed(1)
    with recompute.watching(model):
        assert recompute.run(step_of(model)) == loss


def test_what_a_failed_backward_left_behind_is_not_counted_twice():
    model = small()
    step = step_of(model)
    step()
    whole = gradients(model)
    model.zero_grad()

    failing_behind_all_other_gradients(model)
    recompute = Recompute()
    with recompute.watching(model):
        recompute.run(step)
    assert all(torch.equal(*pair) for pair in zip(whole, gradients(model), strict=True))


@pytest.mark.parametrize("why", ["another error", "gradients of a whole model before it", "all are recomputed"])
def test_what_running_again_does_not_cure_is_raised(why):
    model = small()
    recompute = Recompute()
    tries = []

    def step():
        tries.append(recompute.count)
        raise RuntimeError("shapes do not fit" if why == "another error" else NO_MEMORY)

    if why == "gradients of a whole model before it":
        step_of(model)()
        before = gradients(model)
    with recompute.watching(model), pytest.raises(RuntimeError, match=r"shapes|allocate memory") as caught:
        recompute.run(step)
    assert getattr(caught.value, "__notes__", []) == ([] if why == "another error" else [ADVICE])
    assert tries == ([0, 2, 4, 6, 8] if why == "all are recomputed" else [0])
    if why == "gradients of a whole model before it":
        assert all(torch.equal(*pair) for pair in zip(before, gradients(model), strict=True))


def norms_alone(model):
    for name, weight in model.named_parameters():
        weight.requires_grad_("norm" in name)
    return [weight for weight in model.parameters() if weight.requires_grad]


def test_a_later_micro_batch_runs_again_and_gradients_of_earlier_ones_are_kept():
    model = small()
    trained = norms_alone(model)
    step_of(model)()
    step_of(model, 24)()
    whole = [weight.grad.clone() for weight in trained]
    model.zero_grad()
    recompute = Recompute()
    with recompute.watching(model):
        recompute.run(step_of(model))
        failing_unless_recomputed(model.model.layers[1])
        recompute.run(step_of(model, 24))
    assert recompute.count == 2
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(trained, whole, strict=True))


def test_where_gradients_are_large_the_step_runs_again_from_its_first_micro_batch():
    model = small()
    dropout = torch.nn.Dropout(0.5)
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: dropout(output))
    lengths = (16, 24, 20)
    torch.manual_seed(1)
    losses = [step_of(model, length)() for length in lengths]
    whole = gradients(model)
    model.zero_grad()
    torch.manual_seed(1)
    recompute = Recompute()
    with recompute.watching(model):
        # Of an earlier step, which does not run again.
        recompute.run(step_of(model))
        model.zero_grad()
        torch.manual_seed(1)
        first = [recompute.run(step_of(model, length)) for length in lengths[:2]]
        failing_unless_recomputed(model.model.layers[3])
        assert [*first, recompute.run(step_of(model, lengths[2]))] == losses
    assert recompute.count == 4
    assert all(torch.equal(*pair) for pair in zip(whole, gradients(model), strict=True))


def test_an_error_in_a_later_micro_batch_leaves_the_gradients_before_it():
    model = small()
    trained = norms_alone(model)
    step_of(model)()
    before = [weight.grad.clone() for weight in trained]

    def fail():
        step_of(model)()
        raise RuntimeError("shapes do not fit")

    recompute = Recompute()
    with recompute.watching(model), pytest.raises(RuntimeError, match="shapes"):
        recompute.run(fail)
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(trained, before, strict=True))


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (RuntimeError(NO_MEMORY), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.OutOfMemoryError("XPU out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("memory"), False),
    ],
)
def test_it_tells_want_of_memory_from_other_errors(error, lacks):
    assert lacks_memory(error) == lacks


def test_layers_of_a_tower_are_recomputed_where_they_train():
    model, processor = MODELS["llava"]()
    own = len(model.get_decoder().layers)
    model.requires_grad_(False)
    assert len(RecomputedLayers(model).layers) == own
    tower = model.model.vision_tower.requires_grad_(True)
    layers = RecomputedLayers(model)
    assert len(layers.layers) > own
    assert layers.layers[-own:] == list(model.get_decoder().layers)
    batch = MultimodalCollator(processor)([encode_sample(processor, *first_medium(model, 0))])
    model.train()(**batch).loss.backward()
    whole = [weight.grad.clone() for weight in tower.parameters() if weight.grad is not None]
    model.zero_grad()
    layers.recompute(len(layers.layers))
    ran = []
    layers.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    model(**batch).loss.backward()
    assert len(ran) == 2
    again = [weight.grad for weight in tower.parameters() if weight.grad is not None]
    assert whole
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))


LIMITED = """
import resource
import torch
from mmpeft.training.recompute import Recompute
from tests.training.test_recompute import gradients, small, step_of

torch.set_num_threads(1)
model = small()
step, saved = step_of(model, 8192), []
def count(tensor):
    saved.append(tensor.nbytes)
    return tensor
with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
    loss = step()
whole = gradients(model)
model.zero_grad()
size = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (size + sum(saved) * 6 // 10, resource.RLIM_INFINITY))
recompute = Recompute()
with recompute.watching(model):
    again = recompute.run(step)
equal = all(torch.equal(*pair) for pair in zip(whole, gradients(model), strict=True))
print(sum(saved) >> 20, recompute.count, recompute.total, again == loss, equal)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is that of Linux")
def test_real_memory_that_runs_out_is_made_to_suffice():
    # Freed memory goes back at once, so that the limit is one on what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    saved, count, total, *same = done.stdout.split()
    assert int(saved) > 100
    assert 0 < int(count) <= int(total)
    assert same == ["True", "True"]


class Late(TrainerCallback):
    """Memory that lacks from the second micro-batch of the second step on."""

    def __init__(self, layer):
        self.layer = layer

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            failing_unless_recomputed(self.layer)


def train(folder, *, fails, late=False, **compute):
    model, processor = MODELS["llava"]()
    rows = [encode_sample(processor, *first_medium(model, number)) for number in range(8)]
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    trainer = MultimodalTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=MultimodalCollator(processor, supervised_only=True),
        compute=Compute(**compute),
    )
    if late:
        trainer.add_callback(Late(model.get_decoder().layers[0]))
    elif fails:
        failing_unless_recomputed(model.get_decoder().layers[0])
    trainer.train()
    return trainer, trainer.state.log_history[-1]["train_loss"]


@pytest.mark.parametrize(
    ("late", "compiled"), [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_training_goes_on_with_the_same_losses(tmp_path, late, compiled):
    _, plain = train(tmp_path, fails=False)
    trainer, loss = train(tmp_path, fails=True, late=late, compile=compiled)
    assert loss == pytest.approx(plain, rel=1e-6)
    recompute = trainer.computing.recompute
    # The tower trains, and its layers come first.
    assert (recompute.count, recompute.total) == (3, 4)
    with pytest.raises(RuntimeError, match="allocate memory"):
        train(tmp_path, fails=True, late=late, recompute=False)


class Shown(list):
    """Rows of which two each are on one picture."""

    def media_key(self, index):
        return str(index // 2)


def first_loss(folder, *, fails):
    """Of a model whose loss is a mean of each micro-batch, with a collator that is not ours."""
    model, processor = MODELS["qwen2_5_vl"]()
    collate = MultimodalCollator(processor, supervised_only=False)
    trainer = MultimodalTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=2,
            max_steps=1,
            logging_steps=1,
            remove_unused_columns=False,
        ),
        train_dataset=Shown(encode_sample(processor, *first_medium(model, number)) for number in range(4)),
        data_collator=lambda rows: collate(rows),
        share_media=True,
    )
    if fails:
        failing_unless_recomputed(model.get_decoder().layers[0])
    trainer.train()
    recompute = trainer.computing.recompute
    return trainer.state.log_history[0]["loss"], recompute.parts, recompute.count


def test_a_micro_batch_whose_loss_is_a_mean_is_not_cut(tmp_path):
    loss, *_ = first_loss(tmp_path, fails=False)
    again, parts, count = first_loss(tmp_path, fails=True)
    assert again == pytest.approx(loss, rel=1e-6)
    assert (parts, count > 0) == (1, True)


def test_weights_that_begin_to_train_are_not_counted_twice():
    model = small()
    model.requires_grad_(False)
    recompute = Recompute()
    with recompute.watching(model):
        model.requires_grad_(True)
        step_of(model)()
        whole = gradients(model)
        model.zero_grad()
        failing_behind_all_other_gradients(model)
        recompute.run(step_of(model))
    assert all(torch.equal(*pair) for pair in zip(whole, gradients(model), strict=True))
