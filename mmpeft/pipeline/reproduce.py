"""A run made again from what its adapter says of it, and compared: inputs before, scores and weights after."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import AdapterError, DataError, ModelError
from mmpeft.methods.checkpoint import read_weights
from mmpeft.models.load import FACTS_NAME, load_processor, read_facts, resolve_adapter
from mmpeft.pipeline.base import resolve_base
from mmpeft.pipeline.data import describe_data, load_held_out, load_train
from mmpeft.pipeline.directory import RunDirectory
from mmpeft.pipeline.facts import versions
from mmpeft.pipeline.inputs import base_hash
from mmpeft.pipeline.origin import base_origins, machine, media_fingerprint
from mmpeft.pipeline.run import join_processes, run

logger = logging.getLogger(__name__)

_NAMED = 3
"""Files listed in a message before it says how many more there are."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What came out the second time.

    Attributes:
        output: the new run's directory.
        identical: whether every weight has the same bits and every score is the same.
        elsewhere: what differs of machine and versions, so that bits may; empty where they have to be the same.
        unchecked: inputs that the adapter has no record of.
        scores: `{metric: [then, now]}` after training.
        tensors: how many there are, `differing` how many of them differ.
        largest_difference: of all weights, absolute; `tensor` has it.
    """

    output: Path
    identical: bool
    elsewhere: Sequence[str]
    unchecked: Sequence[str]
    scores: Mapping[str, Sequence[float | None]]
    tensors: int
    differing: int
    largest_difference: float
    tensor: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {**asdict(self), "output": str(self.output)}


def reproduce(
    adapter: str | Path,
    *,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Reproduction:
    """Train an adapter again from its mmpeft.json and compare.

    Args:
        adapter: directory or hub id.
        output: of the new run; default: `runs/reproduced-NAME`.
        overrides: `key=value` as `--set` takes them: where data and base lie now.

    Raises:
        AdapterError: it has no record of its run.
        ModelError, DataError: the base, the data or the media are not those it was trained on; names what changed.
    """
    folder = resolve_adapter(str(adapter))
    facts = read_facts(folder)
    if not facts.get("recipe"):
        raise AdapterError(
            f"{adapter}: no {FACTS_NAME} with a recipe there; only what `mmpeft run` wrote can be made again"
        )
    target = Path(output) if output else Path("runs") / f"reproduced-{_name(facts, adapter)}"
    if target.resolve() in folder.resolve().parents:
        raise AdapterError(f"{target}: the adapter itself lies there; choose another --output")
    recipe = Recipe.from_dict({**facts["recipe"], "output": str(target), "hub": None}, tuple(overrides))
    state = join_processes(recipe)
    elsewhere = [
        *_differences(facts.get("machine") or {}, machine(state)),
        *_differences(facts.get("versions") or {}, versions()),
    ]
    unchecked = [*_check_base(facts, recipe), *_check_data(facts, recipe)]
    for note in unchecked:
        logger.warning("%s", note)
    result = run(recipe, console=console)
    return _compare(folder, facts, result.result, elsewhere, unchecked, result.scores.get("after") or {}, target)


def _name(facts: Mapping[str, Any], adapter: str | Path) -> str:
    return Path(str(facts["recipe"].get("output") or adapter)).name


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if not then:
        return ["what it was made with is not recorded"]
    return [f"{key}: {then[key]} then, {now.get(key)} now" for key in then if then[key] != now.get(key)]


def _check_base(facts: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Refuse another base; what could not be compared.

    Raises:
        ModelError: names part and files.
    """
    recorded = {origin["role"]: origin for origin in facts.get("base") or []}
    if not recorded:
        return ["the base model was not compared: mmpeft.json has no hashes of it"]
    unchecked = []
    for now in base_origins(recipe, recorded):
        then = recorded.get(now["role"])
        if then is None:
            raise ModelError(f"{now['name']}: the adapter was not trained on a {now['role']} model of its own")
        by_commit = "commit" in then and "files" not in then
        if by_commit and "commit" not in now:
            unchecked.append(
                f"the {now['role']} {now['name']} was not compared: a directory, while mmpeft.json has the commit "
                f"{then['commit']} of {then['name']}"
            )
        elif by_commit and then["commit"] != now["commit"]:
            raise ModelError(
                f"{now['name']}: its newest commit is {now['commit']}, the adapter was trained on "
                f"{then['commit']}; fetch that one (`hf download {now['name']} --revision {then['commit']} "
                f"--local-dir DIR`) and give it with --set {_key(now['role'])}=DIR"
            )
        elif not by_commit and (changed := _changed(then, now)):
            raise ModelError(
                f"{now['name']}: not the {now['role']} that the adapter was trained on, for these differ: {changed}; "
                f"say where that one is: --set {_key(now['role'])}=DIR"
            )
    return unchecked


def _key(role: str) -> str:
    return "model" if role == "model" else f"model.{role.split()[0]}"


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if "sha256" in then:
        return "" if then["sha256"] == now.get("sha256") else "its content"
    before, after = then.get("files") or {}, now.get("files") or {}
    names = [name for name in sorted(before) if before[name] != after.get(name)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _check_data(facts: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Refuse other data or media; what could not be compared.

    Raises:
        DataError: names the file.
    """
    base = resolve_base(recipe, RunDirectory(recipe.output).base_model, base_hash(recipe))
    processor = load_processor(base, max_pixels=recipe.data.max_pixels, trust_remote_code=recipe.trust_remote_code)
    try:
        train, held_out = load_train(recipe, processor), load_held_out(recipe, processor)
    except DataError as error:
        raise DataError(
            f"{error}\nSay where the data lie now: --set data.train=FILE --set data.media_root=FOLDER"
        ) from error
    now, then, media = describe_data(recipe, train, held_out), facts.get("data") or {}, facts.get("media") or {}
    unchecked = []
    for name, dataset, key in (("train", train, "data.train"), ("eval", held_out, "data.eval")):
        before, after = then.get(name) or {}, now.get(name) or {}
        if not before and not after:
            continue
        if before.get("streaming") or not before.get("fingerprint"):
            unchecked.append(f"{key} was not compared: mmpeft.json has no hash of its content")
        elif before["fingerprint"] != after.get("fingerprint"):
            raise DataError(
                f"{after.get('file') or key}: not the {key} that the adapter was trained with: "
                f"SHA-256 {str(after.get('fingerprint'))[:12]}... now, {before['fingerprint'][:12]}... then "
                f"({before.get('samples')} samples); put that file back, or say where it is: --set {key}=FILE"
            )
        if not media.get(name):
            unchecked.append(f"the media of {key} were not compared: mmpeft.json has no hash of them")
        elif media[name] != media_fingerprint(dataset):
            raise DataError(
                f"{after.get('media_root')}: the media of {key} are not those the adapter was "
                "trained with; put them back, or say where they are: --set data.media_root=FOLDER"
            )
    return unchecked


def _compare(
    folder: Path,
    facts: Mapping[str, Any],
    made: Path,
    elsewhere: Sequence[str],
    unchecked: Sequence[str],
    scores: Mapping[str, float],
    output: Path,
) -> Reproduction:
    then, now = read_weights(folder), read_weights(made)
    if set(then) != set(now):
        odd = sorted(set(then) ^ set(now))
        raise AdapterError(f"{made}: has other tensors than {folder}, {len(odd)} of them, first {odd[0]}")
    differences: dict[str, float] = {}
    for name, tensor in then.items():
        if tensor.shape != now[name].shape:
            raise AdapterError(f"{made}: {name} has shape {tuple(now[name].shape)}, it had {tuple(tensor.shape)}")
        if not torch.equal(tensor, now[name]):
            differences[name] = float((tensor.double() - now[name].double()).abs().max())
    before = (facts.get("metrics") or {}).get("after") or {}
    worst = max(differences, key=lambda name: differences[name], default=None)
    return Reproduction(
        output=output,
        identical=not differences and all(scores.get(name) == value for name, value in before.items()),
        elsewhere=tuple(elsewhere),
        unchecked=tuple(unchecked),
        scores={name: [value, scores.get(name)] for name, value in before.items()},
        tensors=len(then),
        differing=len(differences),
        largest_difference=differences[worst] if worst else 0.0,
        tensor=worst,
    )
