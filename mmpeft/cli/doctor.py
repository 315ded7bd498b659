"""`mmpeft doctor`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmpeft.cli.output import EXIT_FAILED, JsonOption, human, print_json
from mmpeft.core.files import write_json
from mmpeft.core.lazy import LazyModule
from mmpeft.core.units import size

pipeline = LazyModule("mmpeft.pipeline.doctor")
parity = LazyModule("mmpeft.pipeline.parity")

ParityOption = Annotated[
    bool,
    typer.Option(
        "--npu-parity",
        help="Compare losses, gradients and updates of a device with the CPU's; writes a report to attach to an issue.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="With --npu-parity: the device; npu, cuda or cpu.")]
OutputOption = Annotated[Path, typer.Option("--output", help="With --npu-parity: where the report goes.")]


def doctor(
    npu_parity: ParityOption = False,
    device: DeviceOption = "npu",
    output: OutputOption = Path("npu-parity.json"),
    as_json: JsonOption = False,
) -> None:
    """Show versions, devices, network and what can be decoded, and say what is broken and how to mend it."""
    if npu_parity:
        _compare(device, output, as_json=as_json)
        return
    found = pipeline.diagnose()
    if as_json:
        print_json(found.as_json())
    else:
        console = human(as_json)
        for title, value in _rows(found):
            console.print(f"{title:<13} {value}", markup=False, soft_wrap=True)
        for line in found.warnings:
            console.print(f"warning: {line}", markup=False, soft_wrap=True)
        for line in found.broken:
            console.print(f"broken: {line}", markup=False, soft_wrap=True)
        if not found.broken:
            console.print("nothing is broken")
    if found.broken:
        raise typer.Exit(EXIT_FAILED)


def _rows(found: Any) -> list[tuple[str, str]]:
    """A title and a value for each line of facts."""
    network = found.network
    devices = [
        f"{name} ({size(found.device_memory_bytes[name])})" if name in found.device_memory_bytes else name
        for name in found.devices
    ]
    return [
        *((name, version or "not installed") for name, version in found.versions.items()),
        ("devices", ", ".join(devices)),
        *(("set by a run", f"{name}={value}") for name, value in found.settings.items()),
        ("memory", size(found.memory_bytes)),
        ("disk free", size(found.disk_free_bytes)),
        ("/dev/shm", size(found.shared_memory_bytes)),
        ("open files", "no limit" if found.open_files < 0 else f"{found.open_files} a process"),
        ("host", f"{network.host} ({', '.join(network.host_addresses) or 'does not resolve'})"),
        *((f"interface {one.name}", " ".join(one.addresses)) for one in network.interfaces),
        ("taken by", ", ".join(f"{library} {name or 'none'}" for library, name in network.chosen.items())),
        *((kind, why or "can be decoded") for kind, why in found.media.items()),
    ]


def _compare(device: str, output: Path, *, as_json: bool) -> None:
    found = parity.check_parity(device)
    write_json(output, found.as_json())
    console = human(as_json)
    console.print(f"{found.device} ({found.device_name}) beside the CPU", markup=False, soft_wrap=True)
    line = "{:<24} {:<9} {:>10} {:>14} {:>7}  {:<8} {}"
    console.print(line.format("check", "precision", "difference", "of the largest", "may be", "", "worst"))
    for check in found.checks:
        verdict = {True: "passed", False: "FAILED", None: "left out"}[check.passed]
        figures = ["-" if value is None else f"{value:.2g}" for value in (check.absolute, check.relative)]
        cells = (check.check, check.precision, *figures, f"{check.tolerance:g}", verdict, check.error or check.worst)
        console.print(line.format(*cells), markup=False, soft_wrap=True)
    console.print(f"report: {output}", markup=False, soft_wrap=True)
    if as_json:
        print_json(found.as_json())
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)
