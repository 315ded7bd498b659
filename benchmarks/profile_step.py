"""Where the time of a training step goes: torch.profiler over a few steps of a case of benchmarks/training_speed.py.

    python benchmarks/profile_step.py [--case NAME] [--steps 2] [--skip 1] [--set KEY=VALUE ...]

mmpeft runs the case's recipe, with what `--set` changes, as `mmpeft run --set` takes it: `--set compute.compile=true`
shows what a feature does. Each operator's own time goes to the first of these that fits:

    optimizer       its step and the zeroing of gradients
    data            waiting for the next batch
    attention       scaled dot products, forward and backward
    matmul          matrix products, those of attention in blocks among them
    casts           to another dtype
    copies          concatenating, gathering, making contiguous
    softmax         of attention in blocks, and of the logits
    fused           kernels that torch.compile made of norms, activations, casts and sums
    other           norms, activations, the loss, Python between operators of a range

What runs inside the vision tower is told apart. Below the table stands what would be left of the time if nothing took
any but matrix products and attention, and with softmax and fused kernels: no way to compute the same is faster than the
first, and none that reads and writes each activation once faster than the second (of a run that compiles).

Prints a Markdown table; writes nothing. With `--device cuda` the times are those of kernels.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from torch.profiler import ProfilerActivity, profile, record_function
from workload.cases import CASES, make_recipe, write_data
from workload.shapes import SIZES, make_model

import mmpeft
from mmpeft.families.registry import family_of
from mmpeft.methods.plan import base_name

# After mmpeft, which makes a CUDA build of torchvision importable beside a CPU build of torch.
import transformers.trainer  # isort: skip
from transformers import TrainerCallback  # isort: skip

TOWER = "vision tower"
RANGES = {"Optimizer.": "optimizer", "enumerate(DataLoader)": "data"}
"""By the beginning of a range's name."""
OPERATORS = {
    "attention": ("scaled_dot_product", "flash_attention", "ScaledDotProduct"),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear", "aten::matmul"),
    "casts": ("aten::_to_copy", "aten::to"),
    "softmax": ("softmax",),
    "fused": ("CompiledFxGraph",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::index", "aten::gather"),
}
"""By a part of an operator's name, or of that which called it."""

NEEDED = ("attention", "matmul")
"""Categories that no way to compute the same goes without."""

ONE_PASS = (*NEEDED, "softmax", "fused")
"""Those, and what reads and writes each activation about once."""


class Profiled(TrainerCallback):
    """Profiles `steps` steps behind the first `skip`."""

    def __init__(self, skip: int, steps: int, device: str) -> None:
        self.skip, self.steps = skip, steps
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.profile = profile(activities=activities)
        self.running, self.done = False, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        spec = family_of(model)
        for name, module in model.named_modules():
            own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
            if own and all(spec.part_of(base_name(f"{name}.{each}")) == "vision" for each in own):
                module.register_forward_pre_hook(_enter)
                module.register_forward_hook(_leave, always_call=True)
        if not self.skip:
            self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.running:
            self.done += 1
            if self.done == self.steps:
                self._stop()
        elif state.global_step == self.skip:
            self._start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.running:
            self._stop()

    def _start(self) -> None:
        self.profile.start()
        self.running = True

    def _stop(self) -> None:
        self.profile.stop()
        self.running = False


def _enter(module: Any, inputs: Any) -> None:
    module._profiled = record_function(TOWER)
    module._profiled.__enter__()


def _leave(module: Any, inputs: Any, output: Any) -> None:
    module._profiled.__exit__(None, None, None)


def by_category(events: Any, device: str) -> Counter[str]:
    """Microseconds of each category, each operator's own."""
    found: Counter[str] = Counter()
    for event in events:
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[_category(event)] += own
    return found


def _category(event: Any) -> str:
    """Of the innermost operator or range around it that tells."""
    names, around = [], event
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    for begin, category in RANGES.items():
        if any(name.startswith(begin) for name in names):
            return category
    place = f"{TOWER}: " if TOWER in names else ""
    for category, parts in OPERATORS.items():
        # A compiled graph is around what it calls; its own time is that of its kernels.
        if any(part in name for part in parts for name in names[: 1 if category == "fused" else 3]):
            return place + category
    return f"{place}other"


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="distinct-lora-llava-fp32")
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=2, help="that are profiled")
    parser.add_argument("--skip", type=int, default=1, help="steps before them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args()
    case = CASES[options.case]
    profiled = Profiled(options.skip, options.steps, options.device)
    transformers.trainer.DEFAULT_CALLBACKS.append(profiled)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(case.model, options.size, folder / "model")
        write_data(case, folder, SIZES[options.size][case.model][1].side)
        recipe = make_recipe(case, model=folder / "model", data=folder, output=folder / "run", device=options.device)
        recipe["stages"][0]["max_steps"] = options.skip + options.steps
        recipe["data"]["cache"] = {"directory": str(folder / "cache")}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        mmpeft.run(mmpeft.Recipe.from_yaml(folder / "recipe.yaml", tuple(options.set)))
    found = by_category(profiled.profile.events(), options.device)
    total = sum(found.values())
    sys.stdout.write(f"{case.name}, {options.size}, {profiled.done} steps of {case.batch} samples")
    sys.stdout.write(f"{', ' + ', '.join(options.set) if options.set else ''}\n\n")
    sys.stdout.write("| where | seconds a step | share |\n|---|---|---|\n")
    for category, micros in found.most_common():
        sys.stdout.write(f"| {category} | {micros / 1e6 / max(profiled.done, 1):.3f} | {micros / total:.0%} |\n")
    for what, kinds in (("products and attention", NEEDED), ("these, softmax and fused kernels", ONE_PASS)):
        left = sum(micros for category, micros in found.items() if category.endswith(kinds))
        sys.stdout.write(f"\nfaster by at most, were only {what} left: {total / left:.2f}\n")


if __name__ == "__main__":
    main()
