"""What the rounds found, as rows of a table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from workload.cases import Case
from workload.flops import useful_flops

BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest relative difference of a step's loss at which two programs count as doing the same maths."""

OURS = "mmpeft"
Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""By program, what each round found."""


class OtherMaths(SystemExit):
    """Two programs do not do the same work."""


def apart(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of two curves.

    Raises:
        OtherMaths: they do not have as many steps.
    """
    if len(losses) != len(others):
        raise OtherMaths(f"found {len(losses)} steps and {len(others)}: not the same work, nothing is written")
    return max(abs(one - other) / abs(other) for one, other in zip(losses, others, strict=True))


def check_losses(case: Case, name: str, losses: Sequence[float], others: Sequence[float]) -> float:
    """The difference to ours.

    Raises:
        OtherMaths: above the bound.
    """
    difference = apart(losses, others)
    if not difference <= BOUNDS[case.dtype]:
        raise OtherMaths(
            f"{case.name}: the losses of {name} are {difference:.2g} off, more than {BOUNDS[case.dtype]:g}: not the "
            f"same maths, nothing is written\n  {OURS}  {_curve(losses)}\n  {name}  {_curve(others)}"
        )
    return difference


def _curve(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.5f}" for loss in losses)


def case_rows(case: Case, size: str, *, epochs: int, found: Found, rates: Sequence[float]) -> list[dict[str, Any]]:
    """One row a program.

    Args:
        epochs: that ours ran; of a peer that ran more, the first of them count, for it computes the same in each.
        rates: FLOP a second of the matrix product, once a round.
    """
    useful = useful_flops(case, size, found[OURS][0]["figures"], epochs=epochs)
    rate, samples = statistics.median(rates), case.samples * epochs
    ours = [_seconds(result, epochs) for result in found[OURS]]
    rows = []
    for name, results in found.items():
        seconds = [_seconds(result, epochs) for result in results]
        steps = len(found[OURS][0]["losses"])
        difference = max(
            check_losses(case, name, mine["losses"], result["losses"][:steps])
            for mine, result in zip(found[OURS], results, strict=True)
        )
        ratios = [other / mine for other, mine in zip(seconds, ours, strict=True)]
        speed = statistics.median(seconds)
        rows.append(
            {
                "case": case.name,
                "epochs": epochs,
                "program": name,
                "rounds": len(seconds),
                "samples_per_second": _round(samples / speed),
                "samples_per_second_min": _round(samples / max(seconds)),
                "samples_per_second_max": _round(samples / min(seconds)),
                "mmpeft_is_times_as_fast": _round(speed / statistics.median(ours)),
                "mmpeft_is_times_as_fast_min": _round(min(ratios)),
                "mmpeft_is_times_as_fast_max": _round(max(ratios)),
                "useful_flops_per_second": _round(useful / speed),
                "share_of_matrix_product": _round(useful / speed / rate),
                "matrix_product_flops_per_second": _round(rate),
                "peak_gib": _round(max(result["peak_bytes"] for result in results) / 2**30),
                "largest_difference_of_loss": float(f"{difference:.2g}"),
                "before_training_seconds": _round(statistics.median(result["before_seconds"] for result in results)),
                **_waits(results),
            }
        )
    return rows


def _seconds(result: Mapping[str, Any], epochs: int) -> float:
    spent = result["epoch_seconds"]
    return float(result["seconds"]) if len(spent) == epochs else float(sum(spent[:epochs]))


def _waits(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How long and how often training waited for data, in the round in which it did longest; {} of a peer."""
    figures = [result["figures"] for result in results if "figures" in result]
    longest = max(figures, key=lambda each: each["data_wait_seconds"], default=None)
    return {} if longest is None else {name: _round(longest[name]) for name in ("data_wait_seconds", "data_waits")}


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def markdown(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The rows as a page."""
    lines = [
        "# Training speed at equal maths",
        "",
        f"{facts['hardware']}. " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".",
        "; ".join(facts["programs"].values()) + ".",
        f"Written by `{facts['command']}`; what is measured, and how, is said there.",
        "",
        "| case | epochs | program | rounds | samples/s (min-max) | mmpeft is faster by (min-max) | it could be by at "
        "most | share of the matrix product | peak memory | largest difference of loss | waited for data |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        faster = most = difference = waited = ""
        if row["program"] != OURS:
            faster = (
                f"{row['mmpeft_is_times_as_fast']:.3g} "
                f"({row['mmpeft_is_times_as_fast_min']:.3g}-{row['mmpeft_is_times_as_fast_max']:.3g})"
            )
            most = f"{1 / row['share_of_matrix_product']:.3g}"
            difference = row["largest_difference_of_loss"]
        if "data_waits" in row:
            waited = f"{row['data_wait_seconds']:.2f} s, {row['data_waits']:.0f} times"
        lines.append(
            f"| {row['case']} | {row['epochs']} | {row['program']} | {row['rounds']} | {row['samples_per_second']:.3g} "
            f"({row['samples_per_second_min']:.3g}-{row['samples_per_second_max']:.3g}) | {faster} | {most} | "
            f"{row['share_of_matrix_product']:.0%} | {row['peak_gib']:.2f} GiB | "
            f"{difference} | {waited} |"
        )
    lines += [
        "",
        "What it could be by at most: if nothing but the useful products were computed "
        "(benchmarks/workload/flops.py), and those at the full rate of the matrix product.",
    ]
    lines += [f"\n{name}: {reason}" for name, reason in facts["left_out"].items()]
    return "\n".join(lines) + "\n"
