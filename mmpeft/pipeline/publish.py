"""A run, adapter, model or export as it would lie on the Hub: files, card, no secret, no path of this machine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from mmpeft.core.errors import AdapterError, HubError
from mmpeft.core.files import read_json
from mmpeft.export.card import render_card
from mmpeft.export.card_metadata import Published, base_of, hub_bases, inherited_license, is_hub_id
from mmpeft.export.hub import Pushed, Sent, check_repo, has_same_weights, send, size_of
from mmpeft.export.leaks import find_leaks, this_machine
from mmpeft.export.portable import Portable, cached_id, project_root
from mmpeft.export.publishable import QUANTISED, Kind, Publishable, check_links, check_whole, open_publishable
from mmpeft.models.load import FACTS_NAME, adapter_base, read_adapter_config
from mmpeft.pipeline.directory import RunDirectory
from mmpeft.pipeline.pictures import chart_files
from mmpeft.pipeline.record import RunRecord, read_run

CARD_NAME = "README.md"
_SHOWN = 20
"""Places listed in a message before it says how many more there are."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What would be pushed.

    Attributes:
        base_model: the base's name on the Hub; None where it has none or needs none.
        base_folder: its directory here, where the adapter was trained on one.
        files: by their name in the repository; bytes where they are written or rewritten for it.
        left_out: names of files of the directory that are not published, each with the reason.
        license: `license`, and `license_name` and `license_link` where the base's card has them.
        notes: for people.
    """

    path: Path
    repo: str
    kind: Kind
    base_model: str | None
    base_folder: Path | None
    files: Mapping[str, Sent]
    left_out: Mapping[str, str]
    license: Mapping[str, str]
    notes: Sequence[str]

    @property
    def card(self) -> str:
        """The text of README.md."""
        source = self.files[CARD_NAME]
        return source.read_text(encoding="utf-8") if isinstance(source, Path) else source.decode()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        rows = [
            {"name": name, "bytes": size_of(source), "rewritten": isinstance(source, bytes)}
            for name, source in sorted(self.files.items())
        ]
        return {
            "repo": self.repo,
            "kind": self.kind,
            "base_model": self.base_model,
            "license": dict(self.license),
            "files": rows,
            "bytes": sum(row["bytes"] for row in rows),
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    license: str | None = None,
    exclude: Sequence[str] = (),
    card: Path | None = None,
    unverified: bool = False,
) -> Pushed:
    """Publish what a run or an export wrote, in one commit; see `prepare` for the arguments.

    Args:
        private: of a repository that does not exist yet.

    Raises:
        MMPeftError: as of `prepare`; and the Hub's own refusals.
    """
    made = prepare(
        path, repo, base_model=base_model, license=license, exclude=exclude, card=card, unverified=unverified
    )
    return push_prepared(made, private=private)


def push_prepared(made: Publication, *, private: bool) -> Pushed:
    """Send what `prepare` has made; a base that is not on the Hub under its name yet goes first.

    Raises:
        HubError: the Hub refuses, or has other weights under the base's name.
    """
    if not private and not made.license:
        raise HubError(
            f"{made.repo}: the licence is not known, and the repository would be public; say it with --license, such "
            "as --license apache-2.0"
        )
    if made.base_folder is not None and made.base_model is not None:
        same = has_same_weights(made.base_model, made.base_folder)
        if same is False:
            raise HubError(
                f"{made.base_model}: its weights are not those of {made.base_folder}, which the adapter was trained "
                "on; give another --base-model"
            )
        if same is None:
            push(made.base_folder, made.base_model, private=private, license=made.license.get("license"))
    return send(made.files, made.repo, private=private, message=f"Upload {made.kind} with mmpeft")


def prepare(
    path: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    exclude: Sequence[str] = (),
    card: Path | None = None,
    unverified: bool = False,
) -> Publication:
    """Collect and check what is to be published; nothing is sent and nothing written.

    Args:
        path: a run's directory, an adapter, a model or an export.
        repo: OWNER/NAME.
        base_model: the base's name on the Hub, where the adapter was trained on a directory.
        license: as the Hub calls it; default: that of the base's card.
        exclude: patterns of files to leave out.
        card: a README.md to take instead of the one that is made.
        unverified: whether an export that was not compared with its source may go.

    Raises:
        HubError: a secret or a path of this machine in a file, an export that failed its comparison, no artefact.
        AdapterError, ModelError: it is not whole.
    """
    check_repo(repo)
    record, folder = _resolve(Path(path))
    artefact = open_publishable(folder, exclude=tuple(exclude))
    check_links(artefact)
    _check_parity(artefact, unverified=unverified)
    check_whole(artefact)
    base, base_folder = _base(artefact, base_model)
    told = _Told.of(artefact, record, base=base, base_folder=base_folder, repo=repo, license=license)
    files = _collect(artefact, record, told, exclude)
    files[CARD_NAME] = card.read_bytes() if card else render_card(told.facts, told.about).encode()
    _check_leaks(files, [folder, *([record.path] if record else []), *([base_folder] if base_folder else [])])
    return Publication(
        path=folder,
        repo=repo,
        kind=artefact.kind,
        base_model=base,
        base_folder=base_folder,
        files=files,
        left_out=artefact.left_out,
        license=told.about.license,
        notes=list(_notes(artefact, told.about.license, base, base_folder)),
    )


def preview(path: str | Path, repo: str | None = None, *, base_model: str | None = None) -> str:
    """The card that `push` would write; what push refuses is not asked here.

    Raises:
        HubError: there is nothing that has a card.
    """
    record, folder = _resolve(Path(path))
    artefact = open_publishable(folder)
    named = read_adapter_config(folder).get("base_model_name_or_path") if artefact.kind == "adapter" else None
    base = base_model or (_hub_name(str(named)) if named else None)
    told = _Told.of(artefact, record, base=base, base_folder=None, repo=repo, license=None)
    return render_card(told.facts, told.about)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What is told of an artefact: facts of its run without paths of this machine, pictures, and all else of a card."""

    facts: Mapping[str, Any]
    portable: Portable
    pictures: Mapping[str, str]
    about: Published

    @classmethod
    def of(
        cls,
        artefact: Publishable,
        record: RunRecord | None,
        *,
        base: str | None,
        base_folder: Path | None,
        repo: str | None,
        license: str | None,
    ) -> "_Told":
        file = artefact.path / FACTS_NAME
        facts = read_json(file) if file.is_file() else {}
        if record is not None and artefact.kind == "model":
            facts = {**_facts_of_run(record), **facts}
        portable = _portable(artefact, record, facts, base=base, base_folder=base_folder)
        facts = _published_facts(facts, portable, base)
        charts = chart_files(record) if record is not None else {}
        licensors = _licensors(artefact, facts, base, base_folder)
        about = Published(
            kind=artefact.kind,
            repo=repo,
            export=portable.value(artefact.export),
            parity=portable.value(artefact.parity),
            license={"license": license} if license else inherited_license(licensors),
            pictures=[(title, name) for name, (title, _) in charts.items()] if repo else [],
            modules_in_full=_modules_in_full(artefact.path) if artefact.kind == "adapter" else None,
            files=sorted(artefact.files),
        )
        pictures = {name: content for name, (_, content) in charts.items()}
        return cls(facts=facts, portable=portable, pictures=pictures, about=about)


def _collect(artefact: Publishable, record: RunRecord | None, told: _Told, exclude: Sequence[str]) -> dict[str, Sent]:
    """All files but the card, those of ours rewritten that name folders of this machine."""
    files: dict[str, Sent] = dict(artefact.files)
    if record is not None:
        run = RunDirectory(record.path)
        files |= {file.name: file for file in (run.recipe, run.evaluation) if file.is_file()}
    for name, source in list(files.items()):
        rewritten = told.portable.file(source) if isinstance(source, Path) else None
        if rewritten is not None:
            files[name] = rewritten
    if FACTS_NAME in files:
        files[FACTS_NAME] = (json.dumps(told.facts, indent=2, ensure_ascii=False) + "\n").encode()
    files |= {name: content.encode() for name, content in told.pictures.items()}
    return {name: source for name, source in files.items() if not any(fnmatch(name, pattern) for pattern in exclude)}


def _resolve(path: Path) -> tuple[RunRecord | None, Path]:
    """The run that a directory is, or that it is the result of; and the directory of the artefact."""
    if _is_run(path):
        record = read_run(path)
        if record.result is None:
            raise HubError(f"{path}: the run has no result yet; end it with `mmpeft run`, then push")
        return record, record.result
    parent = path.resolve().parent
    if _is_run(parent):
        record = read_run(parent)
        if record.result is not None and record.result.resolve() == path.resolve():
            return record, path
    return None, path


def _is_run(path: Path) -> bool:
    return RunDirectory(path).recipe.is_file() and (path / "stages").is_dir()


def _check_parity(artefact: Publishable, *, unverified: bool) -> None:
    parity = artefact.parity
    if parity is not None and not parity.get("passed"):
        raise HubError(
            f"{artefact.path}: its answers are too far from those of its source (parity.json: "
            f"{parity.get('why') or 'passed is false'}); export it again with more layers left as they are"
        )
    if parity is None and artefact.kind in QUANTISED and not unverified:
        raise HubError(
            f"{artefact.path}: it was not compared with its source (no parity.json); export it again with held-out "
            "data, or push it with --unverified: its card then says so"
        )


def _base(artefact: Publishable, wanted: str | None) -> tuple[str | None, Path | None]:
    """The base's name on the Hub, and the directory it was trained on where there is one."""
    if wanted is not None:
        check_repo(wanted)
    if artefact.kind != "adapter":
        return wanted, None
    config = artefact.files[CONFIG_NAME]
    named = str(read_adapter_config(artefact.path).get("base_model_name_or_path") or "")
    if found := _hub_name(named):
        return wanted or found, None
    try:
        folder = Path(adapter_base(artefact.path))
    except AdapterError:
        folder = None
    if wanted is None:
        lines = config.read_text(encoding="utf-8").splitlines()
        line = next((at for at, text in enumerate(lines, 1) if "base_model_name_or_path" in text), 1)
        raise HubError(
            f"{config}:{line}: base_model_name_or_path is {named!r}, a directory of this machine: nobody else could "
            "load the adapter. Give the base a name on the Hub: --base-model OWNER/NAME; where nothing is there yet, "
            "the base is pushed to it first"
        )
    return wanted, folder


def _hub_name(named: str) -> str | None:
    return cached_id(named) or (named if is_hub_id(named) else None)


def _portable(
    artefact: Publishable,
    record: RunRecord | None,
    facts: Mapping[str, Any],
    *,
    base: str | None,
    base_folder: Path | None,
) -> Portable:
    recipe = dict(record.settings if record else facts.get("recipe") or {})
    recipe.pop("model", None)
    root = project_root([*_strings(recipe), *_strings(facts.get("data") or {})])
    roots = [path for path in (root, Path.cwd()) if path is not None]
    folders = [
        str(facts.get("base_model") or ""),
        *([str(base_folder), str(base_folder.resolve())] if base_folder else []),
    ]
    if artefact.kind == "adapter":
        folders.append(str(read_adapter_config(artefact.path).get("base_model_name_or_path") or ""))
    names = {folder: base for folder in folders if base and folder.startswith("/")}
    return Portable(roots=roots, names=names)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _facts_of_run(record: RunRecord) -> dict[str, Any]:
    """What the card of a model is told, whose run wrote no mmpeft.json beside it."""
    scored = {name: record.evaluation[name] for name in ("before", "after") if name in record.evaluation}
    return {
        "base_model": record.settings.get("model"),
        "recipe": record.settings,
        "stages": [stage.name for stage in record.stages],
        "parts": record.stages[-1].plan.get("parts") if record.stages else {},
        "data": record.data,
        "versions": record.facts.get("versions"),
        "machine": record.facts,
        "metrics": {name: entry.get("metrics") for name, entry in scored.items()},
        "by_kind": {name: entry.get("by_kind") for name, entry in scored.items()},
    }


def _published_facts(facts: Mapping[str, Any], portable: Portable, base: str | None) -> dict[str, Any]:
    """mmpeft.json as it is published: the base by its name, no way to it on this machine."""
    known = dict(portable.value(facts))
    if base is not None:
        known["base_model"] = base
        recipe = dict(known.get("recipe") or {})
        if isinstance(recipe.get("model"), str):
            known["recipe"] = {**recipe, "model": base}
    if "base_model_relative" in known:
        known["base_model_relative"] = None
    return known


def _licensors(
    artefact: Publishable, facts: Mapping[str, Any], base: str | None, base_folder: Path | None
) -> list[str]:
    """Whose licence it inherits: the base's card, here or on the Hub; of a composed model that of all its parts."""
    if base_folder is not None and (base_folder / CARD_NAME).is_file():
        return [str(base_folder)]
    model = (facts.get("recipe") or {}).get("model") or facts.get("composed")
    if isinstance(model, Mapping):
        vision = model.get("vision") or []
        return [str(model.get("language")), *([vision] if isinstance(vision, str) else vision)]
    if base is not None:
        return [base]
    return (
        hub_bases(facts, Published(kind=artefact.kind, export=artefact.export))
        if base_of(facts) or artefact.export
        else []
    )


def _modules_in_full(folder: Path) -> bool:
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as stream:
        return any(".lora_" not in name for name in stream.keys())  # noqa: SIM118


def _check_leaks(files: Mapping[str, Sent], folders: Sequence[Path]) -> None:
    local = this_machine(*folders, Path(constants.HF_HOME), token=get_token())
    found = [leak for name, source in sorted(files.items()) for leak in find_leaks(name, source, local)]
    if found:
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise HubError(
            "nothing was sent, for these must not leave this machine:\n"
            + "\n".join(f"  {leak}" for leak in found[:_SHOWN])
            + more
            + "\nTake them out, or leave the file out with --exclude"
        )


def _notes(
    artefact: Publishable, licence: Mapping[str, str], base: str | None, base_folder: Path | None
) -> Iterator[str]:
    if not licence:
        yield "the licence is not known: no base's card says one that holds for all; --license says it"
    if base_folder is not None:
        yield f"the base {base_folder} goes to {base} first, unless it is there already"
    if artefact.kind in QUANTISED and artefact.parity is None:
        yield "it was not compared with its source"
