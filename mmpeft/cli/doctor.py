"""`mmpeft doctor`."""

import typer

from mmpeft.cli.output import EXIT_FAILED, JsonOption, human, print_json
from mmpeft.core.lazy import LazyModule
from mmpeft.core.units import size

pipeline = LazyModule("mmpeft.pipeline.doctor")


def doctor(as_json: JsonOption = False) -> None:
    """Show versions, devices and what can be decoded, and say what is broken and how to mend it."""
    found = pipeline.diagnose()
    if as_json:
        print_json(found.as_json())
    else:
        console = human(as_json)
        for name, version in found.versions.items():
            console.print(f"{name:<14}{version or 'not installed'}", markup=False)
        console.print(f"{'devices':<14}{', '.join(found.devices)}", markup=False, soft_wrap=True)
        console.print(f"{'memory':<14}{size(found.memory_bytes)}")
        console.print(f"{'disk free':<14}{size(found.disk_free_bytes)}")
        for kind, why in found.media.items():
            console.print(f"{kind:<14}{why or 'can be decoded'}", markup=False, soft_wrap=True)
        for line in found.warnings:
            console.print(f"warning: {line}", markup=False, soft_wrap=True)
        for line in found.broken:
            console.print(f"broken: {line}", markup=False, soft_wrap=True)
        if not found.broken:
            console.print("nothing is broken")
    if found.broken:
        raise typer.Exit(EXIT_FAILED)
