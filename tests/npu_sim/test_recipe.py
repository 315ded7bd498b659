"""A recipe's run on the simulated NPU is that of the CPU, and keeps the host from waiting for the device."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import mmpeft
from mmpeft.config.recipe import Recipe
from mmpeft.core.files import read_json
from mmpeft.models.resting import RestingTowers
from mmpeft.training.callbacks import read_metrics
from tests.npu_sim.process import simulated
from tests.npu_sim.reports import own_reads, reads, reports, without_a_kernel
from tests.pipeline.test_distributed import TOKENS_AND_LAYERS, assert_same_as_one
from tests.processes import command, environment, figures, losses, run_recipe
from tests.project import write_project

MICRO_BATCHES = 20
"""Of a run in one process: two in each of ten steps."""

TRANSFORMERS = {
    # That features fit tokens, in the model's forward.
    "torch/_tensor.py __format__",
    "torch/__init__.py _check_tensor_all_with",
    # Whether positions begin anew in a row.
    "transformers/masking_utils.py find_packed_sequence_indices",
    # Of `masked_scatter`, which puts the features in.
    "backward",
}
"""Where transformers' own forward waits for the device, once a micro-batch each."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A recipe and what the CPU makes of it."""
    path = write_project(tmp_path_factory.mktemp("npu"))
    mmpeft.run(Recipe.from_yaml(path, (f"output={path.parent / 'one'}",)))
    return path


def on_npu(path, library, name, *overrides, devices=1, **environment):
    """The output of a run on simulated NPUs, and what each of its processes saw."""
    output, seen = path.parent / name, path.parent / f"{name}-seen"
    done = run_recipe(
        path,
        f"output={output}",
        "device=npu",
        *overrides,
        env=simulated(library, NPU_SIM_DEVICES=str(devices), NPU_SIM_REPORT=str(seen), **environment),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return output, reports(seen)


@pytest.fixture(scope="module")
def ran(project, npu_library):
    output, (report,) = on_npu(project, npu_library, "npu")
    return output, report


def test_a_recipe_gives_what_it_gives_on_the_cpu(ran, project):
    output, _ = ran
    assert_same_as_one(output, project)
    assert read_json(output / "run.json")["hardware"] == "1 x simulated NPU 0"


@pytest.mark.slow
def test_its_adapter_is_exported_as_int8_and_says_the_same_there(ran, npu_library, tmp_path):
    """Both are compared on the simulated NPU; that Ascend's own server reads the export was never tried."""
    output, _ = ran
    words = [sys.executable, "-m", "mmpeft", "export", "int8", output / "adapter", tmp_path / "int8", "--device", "npu"]
    seen = tmp_path / "seen"
    env = simulated(npu_library, NPU_SIM_REPORT=str(seen))
    done = subprocess.run([*map(str, words), "--json"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["parity"]["passed"]
    (report,) = reports(seen)
    assert without_a_kernel(report["operators"]) == set()


def test_memory_is_that_of_the_device(ran):
    output, report = ran
    rows = [row for stage in sorted((output / "stages").iterdir()) for row in read_metrics(stage / "metrics.jsonl")]
    logged = [row["memory_bytes"] for row in rows if "memory_bytes" in row]
    assert 0 < max(logged) <= report["peak_bytes"] < 10_000_000
    assert max(each["peak_memory_bytes"] for each in figures(output)) == max(logged)


def test_every_operator_has_a_kernel_on_the_npu(ran):
    """The simulation computes each on the CPU; op-plugin lists those that the real device computes."""
    _, report = ran
    assert without_a_kernel(report["operators"]) == set()
    assert report["operators"]["aten::mm"] > MICRO_BATCHES


def test_fused_operators_compute_what_the_record_says(ran):
    output, report = ran
    rows = [{each["name"]: each for each in stage["speedups"]}["compute.npu_kernels"] for stage in figures(output)]
    norms, layers = 5.0, 2.0
    kinds = {"norms": norms, "gated activations": layers, "rotary positions": layers}
    assert all(row["on"] for row in rows)
    assert all(row["saved"] == {f"{kind} of several operations": n for kind, n in kinds.items()} for row in rows)
    for name, modules in (("npu_rms_norm", norms), ("npu_swiglu", layers), ("npu_rotary_mul", 2 * layers)):
        assert report["operators"][f"npu::{name}"] > MICRO_BATCHES * modules
        assert report["operators"][f"npu::{name}_backward"] > 0


def test_settings_stand_when_the_device_is_first_used(ran):
    output, report = ran
    settings = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert report["found_at_first"] == {**settings, "deterministic": "no"}
    facts = read_json(output / "run.json")
    assert (facts["settings"], facts["deterministic"]) == (settings, False)
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True" in (output / "report.html").read_text()


REPEATABLE = {"HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1", "deterministic": "yes"}


def same_bits(left, right):
    assert losses(left) == losses(right)
    weights = [(output / "adapter" / "adapter_model.safetensors").read_bytes() for output in (left, right)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_deterministic_runs_repeat_every_bit(project, npu_library, tmp_path):
    """The second finds the features that the first has kept, and a setting of the user's own."""
    cache = {"MMPEFT_CACHE": str(tmp_path)}
    first, (report,) = on_npu(project, npu_library, "first", "deterministic=true", **cache)
    own = {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64"}
    second, (other,) = on_npu(project, npu_library, "second", "deterministic=true", **cache, **own)
    assert report["found_at_first"] == {**REPEATABLE, "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert other["found_at_first"] == {**REPEATABLE, **own}
    assert read_json(first / "run.json")["deterministic"] is True
    same_bits(first, second)


@pytest.mark.slow
def test_a_setting_that_says_the_opposite_ends_the_run(project, npu_library):
    env = simulated(npu_library, HCCL_DETERMINISTIC="false")
    done = run_recipe(project, f"output={project.parent / 'not'}", "device=npu", "deterministic=true", env=env)
    assert done.returncode != 0
    assert "deterministic: the environment has HCCL_DETERMINISTIC=false" in done.stderr


def test_micro_batches_do_not_wait_for_the_device(ran, project):
    _, report = ran
    found = reads(report, training_step=True)
    base = LlavaForConditionalGeneration.from_pretrained(project.parent / "base").requires_grad_(False)
    # Once a stage, when all features are kept, the tower's weights go to the host.
    assert found.pop("models/resting.py rest") == 2 * len(RestingTowers(base)._weights)
    assert found == dict.fromkeys(TRANSFORMERS, MICRO_BATCHES)


def test_what_reads_the_device_is_known(ran):
    _, report = ran
    assert own_reads(report) == {
        "models/resting.py rest",
        "models/feature_weights.py weights_digest",
        # With a line of the log.
        "training/trainer.py of_all_processes",
        "training/waiting.py _of_the_slowest",
        # Answers.
        "evaluation/decode.py _say",
    }


def test_micro_batches_are_copied_on_a_stream_of_their_own_and_streams_wait(ran):
    output, report = ran
    rows = [{each["name"]: each for each in stage["speedups"]}["compute.copy_ahead"] for stage in figures(output)]
    assert sum(row["saved"]["copies that computing waited for"] for row in rows) == MICRO_BATCHES
    assert report["transfers"]["write pinned on a stream of its own"] > MICRO_BATCHES
    assert report["hazards"] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [("zero2", "fsdp2"), ("zero1", "zero3"), ("ddp", TOKENS_AND_LAYERS)],
)
def test_two_processes_follow_one(project, npu_library, first, second):
    """Over simulated HCCL."""
    output, seen = on_npu(
        project,
        npu_library,
        f"two-{first}-{len(second)}",
        "processes=2",
        f"stages.0.distributed={first}",
        f"stages.1.distributed={second}",
        devices=2,
    )
    assert_same_as_one(output, project)
    assert len(seen) == 2
    # DeepSpeed asks whether a norm is a number.
    by_deepspeed = {"aten::isnan"} if "zero" in first + second else set()
    for report in seen:
        assert without_a_kernel(report["operators"]) <= by_deepspeed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "offload"), [(1, "{strategy: fsdp2, offload: all}"), (2, "{strategy: zero2, offload: optimizer}")]
)
def test_what_waits_in_host_memory_changes_nothing(project, npu_library, offload, processes):
    words = (f"processes={processes}", f"stages.0.distributed={offload}", f"stages.1.distributed={offload}")
    output, _ = on_npu(project, npu_library, f"host-{offload[11:15]}-{processes}", *words, devices=processes)
    assert_same_as_one(output, project)


@pytest.mark.slow
def test_two_processes_repeat_every_bit(project, npu_library):
    words = ("processes=2", "deterministic=true", "stages.0.distributed=zero2", "stages.1.distributed=fsdp2")
    outputs = []
    for name in ("two-first", "two-second"):
        output, seen = on_npu(project, npu_library, name, *words, devices=2)
        assert [each["hccl_found"] for each in seen] == [{"HCCL_DETERMINISTIC": "true"}] * 2
        assert all(each["found_at_first"].items() >= REPEATABLE.items() for each in seen)
        outputs.append(output)
    same_bits(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy"),
    [(1, "auto"), (2, "zero2"), (2, "fsdp2")],
    ids=["one", "zero2", "fsdp2"],
)
def test_an_interrupted_run_goes_on_from_its_checkpoint(project, npu_library, processes, strategy):
    output = project.parent / f"resumed-{strategy}"
    overrides = [
        f"output={output}",
        "device=npu",
        f"processes={processes}",
        *(f"stages.{number}.distributed={strategy}" for number in (0, 1)),
    ]
    env = simulated(npu_library, NPU_SIM_DEVICES=str(processes))
    running = subprocess.Popen(
        command(project, *overrides), cwd=project.parent, env=env, stderr=subprocess.PIPE, text=True
    )
    rows = output / "stages" / "02-language" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (rows.exists() and rows.read_text()):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stderr.read()[-3000:]
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=120)
    assert running.returncode == 130
    assert read_json(rows.with_name("stage.json"))["status"] == "interrupted"
    done = run_recipe(project, *overrides, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "language: goes on from step" in done.stdout
    assert_same_as_one(output, project)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_rows_in_half_precision_take_the_fused_attention(project, npu_library, tmp_path, dtype):
    """With heads of 16 channels, which it needs; the tiny model's have 8."""
    wide = tmp_path / "wide"
    processor = LlavaProcessor.from_pretrained(project.parent / "base")
    config = LlavaForConditionalGeneration.from_pretrained(project.parent / "base").config
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 2, 1
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(wide)
    processor.save_pretrained(wide)
    words = (f"model={wide}", "batch.packing=true", f"dtype={dtype}")
    output, (report,) = on_npu(project, npu_library, f"packed-{dtype}", *words)
    # The gradient scaler's, which are not in op-plugin's list.
    scaling = {"aten::_amp_foreach_non_finite_check_and_unscale_", "aten::_amp_update_scale_"}
    assert without_a_kernel(report["operators"]) == (scaling if dtype == "float16" else set())
    assert report["operators"]["npu::npu_fusion_attention"] > 0
    assert report["operators"]["npu::npu_fusion_attention_backward"] > 0
    plain, (other,) = on_npu(project, npu_library, f"plain-{dtype}", *words, "compute.block_attention=false")
    # Answers take the kernel whatever the training takes.
    assert "npu::npu_fusion_attention_backward" not in other["operators"]
    for ours, theirs in zip(losses(output), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)


@pytest.mark.slow
def test_layers_are_computed_again_where_the_device_has_too_little_memory(project, npu_library, ran):
    _, report = ran
    little = int(report["peak_bytes"] * 0.9)
    output, (seen,) = on_npu(project, npu_library, "little", NPU_SIM_MEMORY=str(little))
    assert seen["peak_bytes"] <= little
    rows = [{each["name"]: each for each in stage["speedups"]} for stage in figures(output)]
    assert any(each["compute.checkpointing"]["on"] for each in rows)
    assert_same_as_one(output, project)


@pytest.mark.slow
def test_a_plan_is_that_of_the_device_and_tells_what_checkpointing_saves(npu_library, tmp_path):
    file = tmp_path / "found.json"
    words = ["benchmarks/memory_savings.py", "--only", "2", "--results", str(file)]
    done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, checkpointed = read_json(file)["rows"]
    for row in (plain, checkpointed):
        assert row["how"] == "rehearsed"
        assert abs(row["error"]) < 0.15
    assert checkpointed["saved"] > 0.1
    assert checkpointed["losses"] == pytest.approx(plain["losses"], rel=1e-5)
