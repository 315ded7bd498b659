"""report.html: what a run did, for people. One file that needs no network and runs no script."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mmpeft.core import units
from mmpeft.core.files import write_text
from mmpeft.pipeline.charts import Band, Bar, Group, Line, bar_chart, legend, line_chart, smooth
from mmpeft.pipeline.gallery import Gallery, build_gallery
from mmpeft.pipeline.record import RunRecord, StageRecord, is_finite, read_run

MOST_KINDS = 12
"""Kinds of question that the accuracy chart draws; the table beneath it has them all."""

_STAGE_STYLES = ("c-1", "c-2", "c-3")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline figure with its label and a line below."""

    label: str
    value: str
    note: str = ""


def write_report(run: Path) -> Path:
    """Write `run/report.html` from whatever the run directory holds; what is missing is named in it.

    Raises:
        OutputError: there is no such directory, or the report cannot be written.
    """
    target = run / "report.html"
    write_text(target, render_report(read_run(run)))
    return target


def render_report(record: RunRecord) -> str:
    """The page; every text from the run is escaped, and the page's own policy forbids scripts and requests."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmpeft.pipeline", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "duration": units.duration,
        "size": units.size,
        "count": units.count,
        "percent": units.percent,
        "rate": units.rate,
        "scientific": units.scientific,
    }
    return environment.get_template("report.html.j2").render(_content(record))


def _content(record: RunRecord) -> dict[str, Any]:
    evaluations = record.evaluations
    metric = leading_metric(evaluations)
    return {
        "record": record,
        "name": record.path.resolve().name,
        "model": _model(record),
        "tiles": _tiles(record, metric),
        "evaluations": evaluations,
        "metric": metric,
        "metrics": _metric_names(evaluations),
        "kinds": _kinds(evaluations),
        "labels": {name: _label(name) for name, _ in evaluations},
        "accuracy": accuracy_chart(evaluations, metric),
        "accuracy_legend": legend((_label(name), style) for name, style in _styles(evaluations)),
        "most_kinds": MOST_KINDS,
        "gallery": _gallery(record, metric),
        "loss": loss_chart(record.stages),
        "rates": _rate_chart(record.stages),
        "rates_legend": legend((name, f"p-{name}") for name in _parts_with_rates(record.stages)),
        "memories": _memories(record),
        "speedups": _speedups(record),
        "loading": _loading(record),
        "metric_title": units.metric_title,
        "not_recorded": units.NOT_RECORDED,
    }


def _model(record: RunRecord) -> str:
    """What was trained, in the words of the recipe."""
    model = record.settings.get("model") or record.adapter.get("base_model") or ""
    if not isinstance(model, Mapping):
        return Path(str(model)).name if Path(str(model)).is_absolute() else str(model)
    vision = model.get("vision")
    names = vision if isinstance(vision, list) else [vision]
    towers = " + ".join(Path(str(name)).name for name in names)
    return f"{towers} → {_kind(model.get('projector', 'mlp'))} projector → {Path(str(model.get('language'))).name}"


def _kind(projector: Any) -> str:
    return str(projector.get("kind", projector)) if isinstance(projector, Mapping) else str(projector)


def _metric_names(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(name for _, entry in evaluations for name in entry.get("metrics") or {}))


def leading_metric(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The metric that charts and tiles show."""
    names = _metric_names(evaluations)
    return "exact_match" if "exact_match" in names or not names else names[0]


def _kinds(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Kinds of question in order of first appearance; none where no question has a kind."""
    kinds = dict.fromkeys(kind for _, entry in evaluations for kind in entry.get("by_kind") or {})
    return [] if list(kinds) == [""] else list(kinds)


def _label(evaluation: str) -> str:
    return evaluation if evaluation in ("before", "after") else f"after {evaluation}"


def _styles(evaluations: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """(evaluation, style): grey before, from light to dark afterwards, the last always the darkest."""
    names = [name for name, _ in evaluations]
    later = [name for name in names if name != "before"]
    styles = {name: _STAGE_STYLES[min(index, len(_STAGE_STYLES) - 1)] for index, name in enumerate(later)}
    return [
        (name, "c-before" if name == "before" else "c-last" if name == later[-1] else styles[name]) for name in names
    ]


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z = 1.959964
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _tiles(record: RunRecord, metric: str) -> list[Tile]:
    figures = [stage.figures for stage in record.stages if stage.figures]
    seconds = _sum(figures, "seconds")
    samples, tokens = _sum(figures, "samples"), _sum(figures, "tokens")
    whole = record.facts.get("seconds")
    trainable = figures[-1].get("trainable_parameters") if figures else None
    total = figures[-1].get("total_parameters") if figures else None
    peaks = [figure.get("peak_memory_bytes") for figure in figures] + [record.facts.get("peak_memory_bytes")]
    last = record.stages[-1].name if record.stages else ""
    return [
        *_score_tile(record.evaluations, metric),
        Tile(
            label="Training time",
            value=units.duration(seconds),
            note=f"{units.duration(whole)} the whole run, its answers included" if whole is not None else "",
        ),
        Tile(
            label="Samples a second",
            value=units.rate(samples / seconds if samples and seconds else None),
            note=f"{units.rate(tokens / seconds)} tokens a second{_saved(figures)}" if tokens and seconds else "",
        ),
        Tile(
            label="Peak memory",
            value=units.size(max((peak for peak in peaks if peak is not None), default=None)),
            note=str(record.facts.get("hardware") or ""),
        ),
        Tile(
            label="Trainable parameters",
            value=units.count(trainable),
            note=f"{units.percent(trainable / total)} of {units.count(total)}, stage {last}"
            if trainable and total
            else "",
        ),
    ]


def _saved(figures: Sequence[Mapping[str, Any]]) -> str:
    """What packed rows left out of what padded batches would have computed; "" if nothing."""
    computed, padded = _sum(figures, "tokens_computed"), _sum(figures, "tokens_padded")
    if not computed or not padded or computed >= padded:
        return ""
    return f", {computed / padded:.0%} of a padded batch's computed"


def _speedups(record: RunRecord) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of each stage and evaluation the rows of the table of what made it faster, what it saved in words."""
    named = [(stage.name, stage.figures.get("speedups") or []) for stage in record.stages]
    named += [(f"questions {_label(name)}", entry.get("speedups") or []) for name, entry in record.evaluations]
    return [
        (name, [{**row, "saved": _amounts(row.get("saved") or {})} for row in rows]) for name, rows in named if rows
    ]


def _memories(record: RunRecord) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Of each stage that has a plan of its memory: the plan, and what was measured; {} where it has not run."""
    named = [(stage.name, stage.plan.get("memory"), stage.figures.get("memory") or {}) for stage in record.stages]
    return [(name, plan, found) for name, plan, found in named if plan]


def _amounts(saved: Mapping[str, float]) -> str:
    """`1.24 M tokens, 12 s`; a dash where nothing was saved."""
    return ", ".join(_amount(unit, value) for unit, value in saved.items()) or "-"


def _amount(unit: str, value: float) -> str:
    if unit == "bytes":
        return units.size(round(value))
    if unit == "seconds":
        return units.duration(value)
    number = units.count(round(value)) if value >= 10 or value == round(value) else units.rate(value)
    return f"{number} {unit.replace('_', ' ')}"


def _sum(figures: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [figure[key] for figure in figures if figure.get(key) is not None]
    return sum(values) if values else None


def _score_tile(evaluations: Sequence[tuple[str, Mapping[str, Any]]], metric: str) -> list[Tile]:
    scored = [(name, entry["metrics"][metric]) for name, entry in evaluations if metric in (entry.get("metrics") or {})]
    if not scored:
        return [Tile(label="Held-out score", value=units.NOT_RECORDED)]
    (first, before), (last, after) = scored[0], scored[-1]
    asked = len(evaluations[-1][1].get("predictions") or [])
    value = units.percent(after) if first == last else f"{units.percent(before)} → {units.percent(after)}"
    note = f"{asked:,} held-out questions"
    if metric == "exact_match" and asked:
        low, high = wilson(after, asked)
        note += f"; 95 % interval {low * 100:.1f} to {high * 100:.1f} %"
    when = _label(first) if first == last else f"{_label(first)} → {_label(last)}"
    return [Tile(label=f"{units.metric_title(metric)} on held-out questions, {when}", value=value, note=note)]


def accuracy_chart(evaluations: Sequence[tuple[str, Mapping[str, Any]]], metric: str) -> Markup:
    """Bars of a metric by kind of question, before and after each stage."""
    entries = dict(evaluations)
    styles = _styles(evaluations)
    kinds = _kinds(evaluations)
    groups = [
        _group(
            "all",
            [(name, style, entries[name].get("metrics") or {}) for name, style in styles],
            metric,
            max((len(entry.get("predictions") or []) for entry in entries.values()), default=0),
        )
    ]
    for kind in kinds[:MOST_KINDS]:
        rows = [(name, style, (entries[name].get("by_kind") or {}).get(kind) or {}) for name, style in styles]
        groups.append(_group(kind or "(no kind)", rows, metric, max(row.get("count") or 0 for _, _, row in rows)))
    said = [
        f"{_label(name)} {units.percent(entry['metrics'].get(metric))}"
        for name, entry in evaluations
        if entry.get("metrics")
    ]
    return bar_chart(groups, label=f"{units.metric_title(metric)} by kind of question; over all: {', '.join(said)}")


def _group(label: str, rows: Sequence[tuple[str, str, Mapping[str, Any]]], metric: str, asked: int) -> Group:
    return Group(
        label=label,
        note=f"{asked:,} questions" if asked != 1 else "1 question",
        bars=[Bar(name=_label(name), style=style, value=row[metric]) for name, style, row in rows if metric in row],
    )


def _gallery(record: RunRecord, metric: str) -> Gallery:
    evaluations = dict(record.evaluations)
    later = [entry for name, entry in record.evaluations if name != "before"]
    if not later:
        return Gallery()
    root = (record.data.get("eval") or {}).get("media_root")
    return build_gallery(evaluations.get("before", {}), later[-1], metric, Path(root) if root else None)


def _offsets(stages: Sequence[StageRecord]) -> list[tuple[StageRecord, int]]:
    """Each stage with the number of steps before it."""
    done, offsets = 0, []
    for stage in stages:
        offsets.append((stage, done))
        done += stage.steps
    return offsets


def _bands(stages: Sequence[StageRecord]) -> list[Band]:
    return [
        Band(name=stage.name, start=done, end=done + stage.steps) for stage, done in _offsets(stages) if stage.steps
    ]


def loss_chart(stages: Sequence[StageRecord]) -> Markup:
    """The loss by step, all stages one after the other."""
    raw, smoothed, ends = [], [], []
    for stage, done in _offsets(stages):
        points = [(done + row["step"], row["loss"]) for row in stage.metrics if is_finite(row.get("loss"))]
        if points:
            raw.append(Line(name="loss", style="raw", points=points))
            smoothed.append(Line(name="smoothed", style="smooth", points=smooth(points)))
            ends.append(f"stage {stage.name} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
    label = "Training loss by step: " + ", ".join(ends)
    return line_chart([*raw, *smoothed], label=label, x_name="step", y_name="loss", bands=_bands(stages))


def _parts_with_rates(stages: Sequence[StageRecord]) -> list[str]:
    rows = (row.get("learning_rate") or {} for stage in stages for row in stage.metrics)
    return sorted({name for row in rows for name, value in row.items() if is_finite(value)})


def _rate_chart(stages: Sequence[StageRecord]) -> Markup:
    lines = []
    for part in _parts_with_rates(stages):
        for stage, done in _offsets(stages):
            rows = [(done + row["step"], (row.get("learning_rate") or {}).get(part)) for row in stage.metrics]
            points = [(step, float(rate)) for step, rate in rows if rate is not None and is_finite(rate)]
            if points:
                lines.append(Line(name=part, style=f"p-{part}", points=points))
    label = f"Learning rate by step of {', '.join(_parts_with_rates(stages))}"
    return line_chart(lines, label=label, x_name="step", y_name="learning rate", bands=_bands(stages))


def _loading(record: RunRecord) -> str:
    """Three lines of Python that load the result without mmpeft."""
    path = json.dumps(str(record.result or record.path / "adapter"), ensure_ascii=False)
    trust = ", trust_remote_code=True" if record.adapter.get("family") == "composed" else ""
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({path}{trust})\n"
        f"processor = AutoProcessor.from_pretrained({path}{trust})"
    )
