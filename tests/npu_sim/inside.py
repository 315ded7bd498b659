"""What the simulated NPU does, from inside a process that has it: run by test_simulation.py in a process of its own."""

import contextlib
import copy

import pytest
import torch
from accelerate import Accelerator, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch_npu import npu_fusion_attention, npu_rms_norm, npu_rotary_mul, npu_swiglu, simulation
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mmpeft.core.tree import Segment, Tree
from mmpeft.models.npu_kernels import npu_kernels_on
from mmpeft.models.tree_attention import tree_attention
from mmpeft.models.varlen_attention import kernel_for, npu_kernel, varlen_attention
from mmpeft.training.copies import CopiesAhead


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    simulation.forget()


def tower():
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))


def trained(device, *, autocast=None, steps=3):
    torch.manual_seed(0)
    model = tower().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, labels = torch.randn(8, 12), torch.arange(8) % 3
    for _ in range(steps):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            loss = nn.functional.cross_entropy(model(data.to(device)), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), model


def test_it_enters_with_torch():
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch.accelerator.device_count() == torch.npu.device_count() == 2
    assert torch.npu.is_available()
    assert torch.ones(2, device="npu").device == torch.device("npu", 0)
    with torch.npu.device(1):
        assert torch.ones(2, device="npu").device == torch.device("npu", 1)
    with pytest.raises(RuntimeError, match="the simulation has 2"):
        torch.ones(2, device="npu:5")


def test_views_share_memory_and_copies_do_not():
    base = torch.arange(12, device="npu").view(3, 4)
    base.t()[1] = 7
    assert base.tolist() == [[0, 7, 2, 3], [4, 7, 6, 7], [8, 7, 10, 11]]
    assert base[:, 1:3].reshape(-1).tolist() == [7, 2, 7, 6, 7, 10]
    assert base.unfold(0, 2, 1).shape == (2, 4, 2)
    moved = base.clone()
    moved.zero_()
    assert base.sum().item() == 72
    assert base.contiguous().data_ptr() == base.data_ptr()
    weight = nn.Parameter(torch.ones(2, device="npu"))
    weight.data = weight.data.cpu()
    assert weight.device.type == "cpu"
    weight.data = weight.data.npu()
    assert weight.device.type == "npu"
    other = torch.empty(0, device="npu").set_(base.float().untyped_storage(), 4, (2, 4))
    assert other.tolist() == [[4, 7, 6, 7], [8, 7, 10, 11]]


def test_casts_to_float64_give_float32():
    tensor = torch.ones(2, device="npu")
    assert tensor.double().dtype == torch.float32
    assert tensor.bfloat16().dtype == torch.bfloat16
    assert tensor.cpu().double().dtype == torch.float64


def test_training_is_that_of_the_cpu():
    (loss, model), (expected, reference) = trained("npu"), trained("cpu")
    assert loss == pytest.approx(expected, rel=1e-6)
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.cpu(), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision(dtype):
    linear = nn.Linear(4, 4, device="npu")
    with torch.autocast("npu", dtype=dtype):
        out = linear(torch.ones(2, 4, device="npu"))
        assert out.dtype == dtype
        assert torch.softmax(out, -1).dtype == torch.float32
        assert torch.cat([out, out.float()]).dtype == torch.float32
    assert trained("npu", autocast=dtype)[0] == pytest.approx(trained("cpu", autocast=dtype)[0], rel=2e-2)


def test_gradients_are_scaled_in_fp16():
    scaler = torch.npu.amp.GradScaler(init_scale=8.0)
    weight = nn.Parameter(torch.ones(3, device="npu"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * 2).sum()).backward()
    assert weight.grad.tolist() == [16, 16, 16]
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [-1, -1, -1]


def test_storage_is_copied_both_ways():
    tensor = torch.arange(5.0, device="npu")
    storage = tensor.untyped_storage()
    assert storage.device.type == "npu"
    assert torch.frombuffer(bytearray(storage.cpu().tolist()), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4]
    back = torch.tensor([1.0, 2.0]).untyped_storage().npu()
    assert torch.empty(0, device="npu").set_(back).tolist() == [1, 2]
    storage.resize_(0)
    assert storage.nbytes() == 0
    storage.resize_(20)
    tensor.fill_(3)
    assert tensor.tolist() == [3] * 5


@pytest.mark.parametrize("place", ["npu", "cpu", "npu:1", None])
def test_checkpoints_are_written_and_read(place, tmp_path):
    _, model = trained("npu")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 12, device="npu")).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", map_location=place, weights_only=True)
    for name, tensor in model.state_dict().items():
        assert found["model"][name].device == torch.device(place or "npu:0") or place == "npu"
        assert torch.equal(found["model"][name].cpu(), tensor.cpu())
    assert found["optimizer"]["state"][0]["exp_avg"].device.type == ("cpu" if place == "cpu" else "npu")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for name, tensor in load_file(tmp_path / "weights.safetensors", device=place or "npu").items():
        assert torch.equal(tensor.cpu(), model.state_dict()[name].cpu())
    assert torch.equal(copy.deepcopy(model)[0].weight.cpu(), model[0].weight.cpu())


def test_random_numbers_are_the_devices_own():
    torch.manual_seed(3)
    state, host = torch.npu.get_rng_state(), torch.get_rng_state()
    first = torch.rand(4, device="npu")
    assert torch.equal(torch.get_rng_state(), host)
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="npu"), first)
    with torch.random.fork_rng(devices=[0], device_type="npu"):
        torch.rand(4, device="npu")
    after = torch.rand(4, device="npu")
    torch.npu.manual_seed_all(3)
    torch.rand(4, device="npu")
    assert torch.equal(torch.rand(4, device="npu"), after)
    generator = torch.Generator(device="npu").manual_seed(5)
    assert torch.equal(
        torch.randn(3, device="npu", generator=generator).cpu(), torch.randn(3, generator=torch.manual_seed(5))
    )
    states = torch.npu.get_rng_state_all()
    assert len(states) == 2
    assert not torch.equal(torch.rand(4, device="npu:1"), torch.rand(4, device="npu:1"))
    torch.npu.set_rng_state_all(states)
    kept = nn.functional.dropout(torch.ones(64, device="npu"), 0.5)
    torch.npu.set_rng_state_all(states)
    assert torch.equal(nn.functional.dropout(torch.ones(64, device="npu"), 0.5), kept)


def test_memory_is_counted():
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    tensor = torch.empty(1000, device="npu")
    assert torch.npu.memory_allocated() - before == 4000
    del tensor
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() == torch.accelerator.max_memory_allocated() == before + 4000
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == before
    free, total = torch.npu.mem_get_info()
    assert total - free == before
    assert torch.npu.memory_allocated(1) == 0


def test_memory_ends():
    try:
        simulation.set_memory_limit(torch.npu.memory_allocated() + 1000)
        with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
            torch.empty(1000, device="npu")
    finally:
        simulation.set_memory_limit(64 << 30)


def test_host_memory_is_pinned():
    tensor = torch.ones(4)
    assert not tensor.is_pinned()
    pinned = tensor.pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    simulation.forget()
    assert pinned.to("npu", non_blocking=True).tolist() == [1] * 4
    assert tensor.to("npu").tolist() == [1] * 4
    assert simulation.transfers() == {"write pinned": 1, "write": 1, "read copy": 2}
    loader = torch.utils.data.DataLoader(list(range(4)), batch_size=2, pin_memory=True)
    assert all(batch.is_pinned() for batch in loader)


def test_streams_and_events():
    stream = torch.npu.Stream()
    default = torch.npu.current_stream()
    assert stream != default
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
        event = torch.npu.Event(enable_timing=True)
        event.record()
        tensor = torch.ones(2, device="npu")
        tensor.record_stream(stream)
    assert torch.npu.current_stream() == default == torch.npu.default_stream()
    default.wait_stream(stream)
    default.wait_event(event)
    later = torch.npu.Event(enable_timing=True)
    later.record(default)
    assert event.query()
    assert event.elapsed_time(later) >= 0
    torch.npu.synchronize()
    assert simulation.transfers() == {"read synchronize": 1}


def copied_aside(shape=(4,)):
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        return stream, torch.ones(shape).pin_memory().to("npu", non_blocking=True)


def test_streams_that_do_not_wait_are_counted():
    current = torch.npu.current_stream()
    stream, tensor = copied_aside()
    assert simulation.transfers() == {"write pinned on a stream of its own": 1}
    tensor + 1
    assert simulation.hazards() == {"used before it was written": 1}
    simulation.forget()
    current.wait_stream(stream)
    tensor + 1
    assert simulation.hazards() == {}
    with torch.npu.stream(stream):
        tensor.zero_()
    assert simulation.hazards() == {"written while it was used": 1}
    del tensor
    assert simulation.hazards() == {"given back while it was used": 1, "written while it was used": 1}


@pytest.mark.parametrize("how", ["recorded", "synchronized", "waited for"])
def test_streams_that_wait_are_not(how):
    current = torch.npu.current_stream()
    stream, tensor = copied_aside()
    current.wait_stream(stream)
    tensor + 1
    if how == "recorded":
        tensor.record_stream(current)
    elif how == "synchronized":
        torch.npu.synchronize()
    else:
        stream.wait_stream(current)
    del tensor
    assert simulation.hazards() == {}


def pinned(number):
    return {
        "input_ids": torch.full((2, 3), number).pin_memory(),
        "features": [{"tensors": (torch.full((4,), float(number)).pin_memory(),)}],
        "numbers": "of the host",
    }


def moved(value):
    if isinstance(value, dict):
        return {key: moved(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(each) for each in value)
    return value.to("npu", non_blocking=True) if isinstance(value, torch.Tensor) else value


def test_the_next_batch_is_copied_when_one_is_taken():
    copies, batches = CopiesAhead(torch.device("npu"), moved), [pinned(number) for number in range(3)]
    copies.expect(batches)
    results = []
    for number, batch in enumerate(batches):
        batch.pop("numbers")
        assert copies.count == number + 1
        found = copies.take(batch)
        assert found.keys() == batch.keys()
        results.append((found["input_ids"] + 1, found["features"][0]["tensors"][0] * 2))
        # Given back before the host has waited for anything.
        del found
    for number, (ids, features) in enumerate(results):
        assert ids.tolist() == [[number + 1] * 3] * 2
        assert features.tolist() == [2 * number] * 4
    assert simulation.transfers()["write pinned on a stream of its own"] == 6
    assert copies.take(batches[0]) is None
    assert simulation.hazards() == {}


def test_a_batch_that_was_not_expected_is_not_copied():
    copies, batches = CopiesAhead(torch.device("npu"), moved), [pinned(0), {"input_ids": torch.ones(2)}, pinned(2)]
    copies.expect(batches)
    assert copies.take(pinned(0)) is None
    assert copies.take(batches[1]) is None
    assert copies.take(batches[2])["input_ids"].device.type == "npu"
    copies.expect(batches)
    copies.forget()
    assert copies.take(batches[0]) is None
    assert simulation.hazards() == {}


def test_operators_and_reads_are_counted():
    simulation.watch_reads()
    tensor = torch.ones(2, 2, device="npu")
    product = tensor @ tensor
    assert simulation.operators()["aten::mm"] == 1
    assert not any(kind.startswith("read") for kind in simulation.transfers())
    product.sum().item()
    product.cpu()
    torch.nonzero(product)
    found = simulation.transfers()
    assert {kind: count for kind, count in found.items() if kind.startswith("read")} == {
        "read item": 1,
        "read copy": 1,
        "read aten::nonzero": 1,
    }
    assert sum(simulation.reads().values()) == 3
    assert all("inside.py" in line for _, _, line, _ in simulation.reads())
    simulation.forget()
    assert simulation.operators() == simulation.transfers() == simulation.reads() == {}


def heads(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def on_both(function, *tensors):
    """The outputs and gradients of `function` on the device, and of `reference` on the CPU."""
    leaves = [each.clone().to("npu").requires_grad_() for each in tensors]
    out = function(*leaves)
    out.backward(torch.ones_like(out))
    return [out.detach().cpu(), *(each.grad.cpu() for each in leaves)]


def on_cpu(function, *tensors):
    leaves = [each.clone().requires_grad_() for each in tensors]
    out = function(*leaves)
    out.backward(torch.ones_like(out))
    return [out.detach(), *(each.grad for each in leaves)]


def assert_same(found, expected):
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
def test_fused_attention_is_attention(layout):
    query, key, value = heads(2, 4, 5, 16), heads(2, 2, 5, 16), heads(2, 2, 5, 16)
    change = {
        "BNSD": (lambda each: each, lambda out: out),
        "BSND": (lambda each: each.transpose(1, 2), lambda out: out.transpose(1, 2)),
        "BSH": (lambda each: each.transpose(1, 2).flatten(2), lambda out: out.unflatten(2, (4, 16)).transpose(1, 2)),
        "SBH": (
            lambda each: each.permute(2, 0, 1, 3).flatten(2),
            lambda out: out.unflatten(2, (4, 16)).permute(1, 2, 0, 3),
        ),
    }[layout]
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)

    def fused(*tensors):
        inputs = [change[0](each) for each in tensors]
        out = npu_fusion_attention(*inputs, 4, layout, atten_mask=mask, scale=0.25, sparse_mode=3)[0]
        return change[1](out)

    def plain(query, key, value):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.25, enable_gqa=True
        )

    simulation.forget()
    assert_same(on_both(fused, query, key, value), on_cpu(plain, query, key, value))
    assert simulation.operators()["npu::npu_fusion_attention"] == 1
    assert simulation.operators()["npu::npu_fusion_attention_backward"] == 1


def test_fused_attention_of_unequal_lengths():
    ends_q, ends_k = (3, 8, 9), (3, 12, 13)
    mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
    query, key, value = heads(9, 4, 16), heads(13, 2, 16), heads(13, 2, 16)

    def fused(*tensors):
        return npu_fusion_attention(
            *tensors,
            4,
            "TND",
            atten_mask=mask,
            scale=0.25,
            actual_seq_qlen=ends_q,
            actual_seq_kvlen=ends_k,
            sparse_mode=3,
        )[0]

    def plain(query, key, value):
        parts = []
        for q, to_q, k, to_k in ((0, 3, 0, 3), (3, 8, 3, 12), (8, 9, 12, 13)):
            one = [each.transpose(0, 1)[None] for each in (query[q:to_q], key[k:to_k], value[k:to_k])]
            seen = torch.ones(to_q - q, to_k - k, dtype=torch.bool).tril((to_k - k) - (to_q - q))
            out = nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, scale=0.25, enable_gqa=True)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    assert_same(on_both(fused, query, key, value), on_cpu(plain, query, key, value))


SHARED = Tree(
    segments=(
        Segment(start=0, end=6),
        Segment(start=6, end=9, parent=(0, 6)),
        Segment(start=9, end=13, parent=(0, 6)),
        Segment(start=13, end=18),
    ),
    samples=3,
    tokens=18,
    padded=32,
)
"""A segment that two others continue, and one alone."""


@pytest.mark.parametrize("window", [None, 3])
def test_a_packed_row_in_one_call_is_that_of_sdpa(window):
    query, key, value = heads(1, 4, 18, 16), heads(1, 2, 18, 16), heads(1, 2, 18, 16)
    simulation.forget()
    found = on_both(lambda q, k, v: varlen_attention(npu_kernel, q, k, v, SHARED, window=window), query, key, value)
    assert simulation.operators()["npu::npu_fusion_attention"] == 1
    expected = on_cpu(
        lambda q, k, v: tree_attention(None, q, k, v, None, sliding_window=window, tree=SHARED)[0], query, key, value
    )
    assert_same(found, expected)


def test_a_packed_row_takes_one_call_in_half_precision_without_waiting():
    query = heads(1, 4, 18, 16, dtype=torch.bfloat16).npu()
    assert kernel_for(query, SHARED, 0.0) is npu_kernel
    assert kernel_for(query.float(), SHARED, 0.0) is None
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert kernel_for(query.float(), SHARED, 0.0) is npu_kernel
    row = [query, query[:, :2], query[:, 2:]]
    varlen_attention(npu_kernel, *row, SHARED)
    simulation.forget()
    out = varlen_attention(npu_kernel, *row, SHARED)
    assert out.shape == (1, 18, 4, 16)
    assert not any(kind.startswith("read") for kind in simulation.transfers())


def test_fused_norm_activation_and_rotation():
    states, gamma = heads(2, 5, 16), heads(16)
    assert_same(
        on_both(lambda x, g: npu_rms_norm(x, g, 1e-5)[0], states, gamma),
        on_cpu(lambda x, g: nn.functional.rms_norm(x, (16,), g, 1e-5), states, gamma),
    )
    assert_same(
        on_both(npu_swiglu, states),
        on_cpu(lambda x: nn.functional.silu(x[..., :8]) * x[..., 8:], states),
    )
    turned = lambda x: torch.cat((-x[..., 8:], x[..., :8]), -1)  # noqa: E731
    cosine, sine = heads(1, 5, 16).clamp(-1, 1), heads(1, 5, 16).clamp(-1, 1)
    assert_same(
        on_both(npu_rotary_mul, states, cosine, sine),
        on_cpu(lambda x, c, s: x * c + turned(x) * s, states, cosine, sine),
    )


def language_model(kind=LlamaForCausalLM, config=LlamaConfig):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return kind(config(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


KINDS = [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config), (Phi3ForCausalLM, Phi3Config)]


def stepped(model, *, fused, dtype):
    """The loss and gradients of a step of LoRA in the feed-forward part, on the device."""
    targets = [name for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") if name in str(model)]
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora" in name or "norm" in name or "embed" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted = adapted.npu().train()
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(1)).npu()
    simulation.forget()
    on = npu_kernels_on(adapted) if fused else contextlib.nullcontext()
    with on, torch.autocast("npu", dtype=dtype, enabled=dtype != torch.float32):
        loss = adapted(ids, labels=ids, use_cache=False).loss
        loss.backward()
    gradients = {name: each.grad.cpu() for name, each in adapted.named_parameters() if each.grad is not None}
    return loss.item(), gradients, simulation.operators()


@pytest.mark.parametrize(("kind", "config"), KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_fused_modules_give_loss_and_gradients_of_their_own(kind, config, dtype, tolerance):
    """Weights in half precision but for norms, embeddings and LoRA, which train in float32."""
    model = language_model(kind, config).to(dtype)
    loss, gradients, operators = stepped(model, fused=True, dtype=dtype)
    expected, theirs, others = stepped(model, fused=False, dtype=dtype)
    norms = sum("Norm" in type(module).__name__ for module in model.modules())
    for name, count in (("npu_rms_norm", norms), ("npu_swiglu", 2)):
        assert operators[f"npu::{name}"] == operators[f"npu::{name}_backward"] == count
        assert f"npu::{name}" not in others
    # Cosines have the embeddings' float32, and queries the product's bfloat16 unless a norm follows it: these stay.
    alike = dtype == torch.float32 or kind is Qwen3ForCausalLM
    assert operators.get("npu::npu_rotary_mul", 0) == (4 if alike else 0)
    assert loss == pytest.approx(expected, rel=tolerance / 50)
    assert gradients.keys() == theirs.keys()
    assert any("norm" in name for name in gradients)
    for name, own in gradients.items():
        assert (own - theirs[name]).norm() <= tolerance * theirs[name].norm(), name
    _, exact, _ = stepped(model.float(), fused=False, dtype=torch.float32)
    if dtype != torch.float32:
        assert apart(gradients, exact) <= 1.1 * apart(theirs, exact)


def apart(left, right):
    """The distance of two sets of gradients, in lengths of the second."""
    whole = [torch.cat([each[name].flatten() for name in sorted(each)]) for each in (left, right)]
    return ((whole[0] - whole[1]).norm() / whole[1].norm()).item()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("states", [torch.bfloat16, torch.float32])
def test_a_fused_norm_gives_the_precision_of_its_own(states, weights):
    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight.data = heads(16).to(weights)
    norm, given = norm.npu(), heads(2, 5, 16, dtype=states).npu()
    expected = norm(given)
    with npu_kernels_on(norm):
        found = norm(given)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-2, atol=1e-2)


def test_positions_are_turned_by_the_operator_in_half_precision_too():
    model = language_model().bfloat16().npu()
    ids = torch.arange(12, device="npu").view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits.cpu()
        with npu_kernels_on(model):
            simulation.forget()
            found = model(ids).logits.cpu()
    assert simulation.operators()["npu::npu_rotary_mul"] == 4
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_heads_that_the_operator_is_slow_or_wrong_for_stay():
    """Of twelve channels, 48 bytes; and of a thousand rows."""
    config = LlamaConfig(vocab_size=32, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    narrow, wide = LlamaForCausalLM(config).npu(), language_model().npu()
    for model, shape in ((narrow, (2, 3)), (wide, (1000, 1))):
        simulation.forget()
        with npu_kernels_on(model), torch.no_grad():
            model(torch.ones(shape, dtype=torch.long, device="npu"))
        assert "npu::npu_rotary_mul" not in simulation.operators()
        assert simulation.operators()["npu::npu_rms_norm"] > 0


def test_accelerate_takes_the_device(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    PartialState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    assert accelerator.device.type == "npu"
    model, _ = accelerator.prepare(tower(), torch.optim.AdamW(tower().parameters()))
    out = model(torch.ones(2, 12, device=accelerator.device))
    assert out.device.type == "npu"
    assert out.dtype == torch.float32
    accelerator.backward(out.sum())
