"""What the Hub accepts as the metadata of a model card.

Sources: huggingface.co/docs/hub/model-cards and the specification that it names (huggingface/hub-docs, modelcard.md);
the licences as the Hub itself lists them in an error (huggingface/huggingface_hub, issue 4218).
"""

import re
from typing import Any

import yaml

LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """.split()  # noqa: SIM905
)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
TASKS = (
    "image-text-to-text",
    "audio-text-to-text",
    "video-text-to-text",
    "any-to-any",
    "text-generation",
    "visual-question-answering",
    "image-to-text",
)
_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*")


def problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the text of a README.md."""
    found = re.match(r"---\n(.*?)\n?---\n", content, re.S)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ['"metadata" must be an object'], []
    checks = (_strings, _ids, _known, _languages, _model_index)
    return [text for check in checks for text in check(data)], []


def _strings(data: dict[str, Any]) -> list[str]:
    said = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation", "thumbnail")
        if key in data and not isinstance(data[key], str)
    ]
    for key in ("tags", "metrics"):
        if key in data and not (isinstance(data[key], list) and all(isinstance(value, str) for value in data[key])):
            said.append(f'"{key}" must be an array of strings')
    return said


def _ids(data: dict[str, Any]) -> list[str]:
    said = []
    for key, what in (("base_model", "models"), ("datasets", "datasets")):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not _ID.fullmatch(value):
                said.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/{what}.')
    return said


def _known(data: dict[str, Any]) -> list[str]:
    said = []
    for key, allowed in (("license", LICENSES), ("base_model_relation", RELATIONS), ("pipeline_tag", TASKS)):
        values = data.get(key, [])
        wrong = [value for value in (values if isinstance(values, list) else [values]) if value not in allowed]
        if wrong:
            said.append(f'"{key}" must be one of [{", ".join(sorted(allowed))}]')
    if data.get("license") == "other" and "license_name" not in data:
        said.append('"license_name" is required where "license" is "other"')
    return said


def _languages(data: dict[str, Any]) -> list[str]:
    values = data.get("language", [])
    wrong = [
        value
        for value in (values if isinstance(values, list) else [values])
        if not isinstance(value, str) or not re.fullmatch(r"[a-z]{2,3}|code|multilingual", value)
    ]
    return [f'"language" must be an ISO 639 code; found {wrong}'] if wrong else []


def _model_index(data: dict[str, Any]) -> list[str]:
    if "model-index" not in data:
        return []
    said = []
    for at, model in enumerate(data["model-index"] or [{}]):
        if not isinstance(model.get("name"), str):
            said.append(f'"model-index[{at}].name" is required')
        for number, result in enumerate(model.get("results") or []):
            where = f"model-index[{at}].results[{number}]"
            for block, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                for key in keys:
                    if not isinstance((result.get(block) or {}).get(key), str):
                        said.append(f'"{where}.{block}.{key}" is required')
            metrics = result.get("metrics")
            if not metrics:
                said.append(f'"{where}.metrics" is required')
            for row in metrics or []:
                if not isinstance(row.get("type"), str) or "value" not in row:
                    said.append(f'"{where}.metrics" needs "type" and "value"')
    return said
