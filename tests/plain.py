"""An adapter loaded by a program that has transformers and peft but no mmpeft: what every artefact must survive."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from mmpeft.core.torchvision import OPERATORS, built_for_other_torch

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

PRELUDE = (
    f"""
from torch.library import Library
library = Library("torchvision", "DEF")
for name in {OPERATORS}:
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
    if built_for_other_torch()
    else ""
)
"""What a machine needs on which transformers cannot be imported by itself, for its torchvision is not torch's."""

PROGRAM = textwrap.dedent(
    """
    import importlib.util, json, sys
    sys.path.insert(0, sys.argv[1])
    assert importlib.util.find_spec("mmpeft") is None, "mmpeft can be imported"
    {PRELUDE}
    import torch
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    adapter, base, picture, prompt, out = sys.argv[2:]
    processor = AutoProcessor.from_pretrained(adapter)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    tensors, answers = {"input_ids": batch["input_ids"]}, {}
    for name, model in (
        ("auto", AutoModelForImageTextToText.from_pretrained(adapter)),
        ("peft", PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)),
    ):
        with torch.no_grad():
            tensors[name] = model.eval()(**batch).logits
            tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
        answers[name] = processor.decode(tokens[0, batch["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    torch.save(tensors, out)
    print(json.dumps(answers))
    """
).replace("{PRELUDE}", PRELUDE)


def load_without_mmpeft(
    adapter: Path, base: Path, picture: Path, prompt: str, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits and greedy answers of `AutoModelForImageTextToText.from_pretrained(adapter)` ("auto") and of
    `PeftModel.from_pretrained(base, adapter)` ("peft"), computed in such a process."""
    out = folder / "logits.pt"
    site = Path(torch.__file__).parent.parent
    done = subprocess.run(
        # -S leaves out the .pth file by which an editable install of mmpeft is found, -I the current directory.
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(site), str(adapter), str(base), str(picture), prompt, str(out)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True), json.loads(done.stdout)
