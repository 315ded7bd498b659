"""`mmpeft data check PATH` and `mmpeft data show PATH`; `convert` and `cache` are mounted beside them."""

from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from mmpeft.cli.cache import cache
from mmpeft.cli.convert import convert
from mmpeft.cli.output import EXIT_DATA, JsonOption, err, human, print_json
from mmpeft.cli.sources import ColumnOption, QuestionOption, SourceArgument, column_map
from mmpeft.core.lazy import LazyModule

augmenting = LazyModule("mmpeft.data.augment")
checks = LazyModule("mmpeft.data.check")
loading = LazyModule("mmpeft.models.load")
mending = LazyModule("mmpeft.data.mend")
views = LazyModule("mmpeft.data.tokens_view")
showing = LazyModule("mmpeft.data.show")

app = typer.Typer(no_args_is_help=True)

RootOption = Annotated[Path | None, typer.Option(help="Folder of the media; default: the source's own.")]


@app.command()
def check(
    path: SourceArgument,
    media_root: RootOption = None,
    held_out: Annotated[Path | None, typer.Option("--eval", help="Held-out file: report what stands in both.")] = None,
    model: Annotated[str | None, typer.Option(help="Measure lengths with this model's processor.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Count samples longer than this.")] = None,
    media: Annotated[bool, typer.Option(help="Decode every picture, film and recording.")] = True,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode; default: one a core.")] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Write a mended copy here, and its list of changes beside it.")
    ] = None,
    column: ColumnOption = None,
    question: QuestionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every row and decode every medium; exit status 3 if anything cannot be used."""
    said: dict[str, Any] = {"columns": column_map(column), "question": question}
    processor = loading.load_processor(model) if model else None
    bars = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*bars, console=err, transient=True, disable=as_json or not err.is_terminal) as progress:
        task = progress.add_task("checking", total=checks.count_lines(path) if err.is_terminal else None)
        report = checks.check_data(
            path,
            media_root,
            eval_path=held_out,
            processor=processor,
            max_length=max_length,
            open_media=media,
            workers=workers,
            on_progress=lambda done, line: progress.update(task, completed=line, description=f"{done} rows checked"),
            **said,
        )
    changes = mending.mend_data(path, fix, media_root, open_media=media, **said) if fix else []
    if as_json:
        print_json({"file": str(path), **asdict(report), **({"changes": len(changes)} if fix else {})})
    else:
        _show_report(human(as_json), report)
    if fix:
        done = ", ".join(f"{name}: {count}" for name, count in mending.count_changes(changes).items())
        err.print(Text(f"mended copy {fix}, {len(changes)} changes ({done or 'none'}) listed in {fix}.changes.json"))
    if report.error_count:
        raise typer.Exit(EXIT_DATA)


def _show_report(console: Console, report: Any) -> None:
    if report.source:
        console.print(str(report.source), markup=False, soft_wrap=True)
    kinds = ", ".join(f"{name or 'no kind'}: {count}" for name, count in report.kinds.items())
    media = f"{report.pictures} pictures" + "".join(
        f", {count} {word}" for count, word in ((report.videos, "videos"), (report.audios, "recordings")) if count
    )
    console.print(
        f"{report.samples} samples ({kinds or 'none'}), {media}, {report.turns} turns",
        markup=False,
    )
    if report.boxes:
        written = f", written as {report.convention}" if report.convention else ""
        console.print(f"{report.boxes} boxes and points{written}", soft_wrap=True)
    if report.lengths:
        figures = ", ".join(f"{name} {value:,}" for name, value in report.lengths.items() if name != "unit")
        console.print(f"length in {report.lengths['unit']}: {figures}")
    if report.answers:
        answers = ", ".join(f"{answer!r} {count}" for answer, count in report.answers.items())
        console.print(f"short answers: {answers}", markup=False, soft_wrap=True)
    for style, name, messages in (("red", "error", report.errors), ("yellow", "warning", report.warnings)):
        for message in messages:
            console.print(Text.assemble((f"{name}: ", style), message), soft_wrap=True)
    unsaid = report.error_count + report.warning_count - len(report.errors) - len(report.warnings)
    more = f", {unsaid} of them not spelt out" if unsaid else ""
    counts = ", ".join(f"{kind} {count:,}" for kind, count in sorted(report.found.items()))
    found = f": {counts}" if counts else ""
    total = f"{report.error_count:,} errors, {report.warning_count:,} warnings{more}{found}"
    console.print(total, markup=False, soft_wrap=True)


@app.command()
def show(
    path: SourceArgument,
    media_root: RootOption = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 3,
    model: Annotated[str | None, typer.Option(help="Show the tokens that this model sees.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one HTML file, with pictures.")] = None,
    augment: Annotated[
        Path | None, typer.Option(help="Show samples varied, too: a recipe, or a YAML file of its data.augment.")
    ] = None,
    epoch: Annotated[int, typer.Option(min=0, help="The epoch, from 0, that --augment shows.")] = 0,
    column: ColumnOption = None,
    question: QuestionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the first samples as turns, or, with --model, as the tokens that the model sees."""
    said: dict[str, Any] = {"columns": column_map(column), "question": question}
    if model or html or augment:
        vary = _variation(augment, epoch)
        processor = loading.load_processor(model) if model else None
        samples = list(islice(views.view_samples(path, processor, media_root, vary=vary, **said), count))
        if html:
            showing.write_page(html, str(path), samples, epoch=epoch if augment else None)
        if as_json:
            print_json({"file": str(path), "samples": samples})
        else:
            _show_pieces(human(as_json), samples, epoch)
        return
    samples = list(islice(showing.describe_samples(path, media_root, **said), count))
    if as_json:
        print_json({"file": str(path), "samples": samples})
        return
    console = human(as_json)
    for sample in samples:
        if "error" in sample:
            console.print(Text.assemble(("error: ", "red"), sample["error"]), soft_wrap=True)
            continue
        kind = f"  kind {sample['kind']!r}" if sample["kind"] else ""
        heading = f"sample {sample['index']}  id {sample['id']!r}  line {sample['line']}{kind}"
        console.print(Text(heading, style="bold"), soft_wrap=True)
        for picture in sample["images"]:
            size = f"{picture['width']} x {picture['height']}" if "width" in picture else picture["error"]
            console.print(Text(f"  picture    {picture['name']}  {size}"), soft_wrap=True)
        for box in sample["boxes"]:
            values = f"{list(box['values'])} {box['unit']} of picture {box['picture']}"
            console.print(Text(f"  box        {values}"), soft_wrap=True)
        for turn in sample["turns"]:
            label = Text(f"  {turn['role']:<10} ", style="cyan")
            console.print(label + Text(turn["text"].replace("\n", "\n" + " " * 13)), soft_wrap=True)


def _variation(path: Path | None, epoch: int) -> Any:
    """What `view_samples` takes as `vary`."""
    if path is None:
        return None
    settings, seed = augmenting.read_augmentation(path)
    return partial(augmenting.augment_with_notes, settings=settings, seed=seed, epoch=epoch)


def _show_pieces(console: Console, samples: list[dict[str, Any]], epoch: int) -> None:
    for sample in samples:
        if "error" in sample:
            console.print(Text.assemble(("error: ", "red"), sample["error"]), soft_wrap=True)
            continue
        counted = _counted(sample["pieces"])
        heading = f"sample {sample['index']}  id {sample['id']!r}  line {sample['line']}{counted}"
        console.print(Text(heading, style="bold"), soft_wrap=True)
        _print_pieces(console, sample)
        if "augmented" not in sample:
            continue
        augmented = sample["augmented"]
        if "error" in augmented:
            console.print(Text.assemble(("error: ", "red"), augmented["error"]), soft_wrap=True)
            continue
        notes = "; ".join(augmented["notes"]) or "unchanged"
        console.print(Text(f"  in epoch {epoch}: {notes}{_counted(augmented['pieces'])}", style="bold"), soft_wrap=True)
        _print_pieces(console, augmented)


def _counted(pieces: list[dict[str, Any]]) -> str:
    total = sum(piece["tokens"] for piece in pieces)
    trained = sum(piece["tokens"] for piece in pieces if piece["trained"])
    return f"  {total} tokens, {trained} trained" if total else ""


def _print_pieces(console: Console, view: dict[str, Any]) -> None:
    styles = {"system": "yellow", "user": "cyan", "media": "magenta", "assistant": "bold green underline"}
    pieces = [(piece["text"], styles[piece["role"]]) for piece in view["pieces"]]
    console.print(Text.assemble(*pieces), soft_wrap=True)
    if "convention" in view:
        console.print(Text(f"  boxes are written as {view['convention']}"), soft_wrap=True)


app.command()(convert)
app.command()(cache)
