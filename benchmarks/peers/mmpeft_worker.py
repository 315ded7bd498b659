"""A workload of benchmarks/training_speed.py by mmpeft, the way `mmpeft run` does it: mmpeft_worker.py WORKLOAD.json"""

import json
import sys
from pathlib import Path

import mmpeft
from mmpeft.core.files import read_json, write_json
from mmpeft.pipeline.run import run

# After mmpeft, which makes a CUDA build of torchvision importable beside a CPU build of torch.
from steps import watch  # isort: skip

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
recipe = mmpeft.Recipe.from_dict(work["recipe"])
watch(work["result"], cold=recipe.data.cache.directory)
made = run(recipe)
stage = made.stages[0]["figures"]
write_json(Path(work["result"]), {**read_json(Path(work["result"])), "figures": stage})
