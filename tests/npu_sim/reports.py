"""What the simulated NPU saw of a run, against what is known of the real one."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmpeft.core.files import read_json

OP_PLUGIN = frozenset((Path(__file__).parent / "op_plugin.txt").read_text(encoding="utf-8").split("\n\n")[1].split())


def reports(prefix: Path) -> list[dict]:
    """Of each process, by rank."""
    return [read_json(path) for path in sorted(prefix.parent.glob(f"{prefix.name}.*.json"))]


def without_a_kernel(operators: Iterable[str]) -> set[str]:
    """Those that op-plugin does not list: torch-npu would compute them on the CPU, copying there and back."""
    return {name for name in operators if name.partition("::")[2] not in OP_PLUGIN}


def reads(report: Mapping, *, training_step: bool) -> Counter[str]:
    """Where the host waited for the device, by file and function; "backward" where autograd's own thread did."""
    found: Counter[str] = Counter()
    for each in report["reads"]:
        if each["training_step"] == training_step:
            found[re.sub(r":\d+ ", " ", each["line"]) or "backward"] += each["count"]
    return found


def own_reads(report: Mapping) -> set[str]:
    """The lines of mmpeft, by file and function, that read a number of the device by themselves."""
    return {re.sub(r":\d+ ", " ", each["line"]) for each in report["reads"] if each["line"] == each["mmpeft"] != ""}
