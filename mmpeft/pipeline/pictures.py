"""The report's charts as SVG files of their own, for a card. None shows a picture or a text of the data."""

import re
from importlib import resources

from markupsafe import Markup

from mmpeft.core import units
from mmpeft.pipeline.record import RunRecord
from mmpeft.pipeline.report import accuracy_chart, leading_metric, loss_chart

_RULES = re.compile(r"^(?::root \{.*?^\}|\.chart [^\n]*|\.c-[^\n]*)", re.MULTILINE | re.DOTALL)
"""What of the report's style sheet charts need: the colours by name, and their own classes."""


def chart_files(record: RunRecord) -> dict[str, tuple[str, str]]:
    """By file name what it shows, and its content; empty for a run that has neither losses nor scores."""
    found = {}
    if any(stage.metrics for stage in record.stages):
        found["figures/loss.svg"] = ("Training loss by step", _standalone(loss_chart(record.stages)))
    evaluations = record.evaluations
    if any(entry.get("metrics") for _, entry in evaluations):
        metric = leading_metric(evaluations)
        title = (
            f"{units.metric_title(metric)} by kind of question, before (grey) and after each stage (the last darkest)"
        )
        found["figures/accuracy.svg"] = (title, _standalone(accuracy_chart(evaluations, metric)))
    return found


def _standalone(chart: Markup) -> str:
    css = resources.files("mmpeft.pipeline").joinpath("report.css").read_text(encoding="utf-8")
    light = css.split("@media", 1)[0] + css.split("\n}\n* {", 1)[-1]
    style = "\n".join(_RULES.findall(light)).replace("color-scheme: light dark;", "")
    opening, rest = str(chart).split(">", 1)
    namespace = "" if "xmlns=" in opening else ' xmlns="http://www.w3.org/2000/svg"'
    background = '<rect width="100%" height="100%" style="fill: var(--panel)"/>'
    return f"{opening}{namespace}><style>{style}</style>{background}{rest}\n"
