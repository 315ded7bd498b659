"""`mmpeft generate` and `mmpeft evaluate`: a base model or an adapter asked."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

import mmpeft
from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.core.lazy import LazyModule

answering = LazyModule("mmpeft.pipeline.answering")

ModelArgument = Annotated[str, typer.Argument(help="Adapter, model or ONNX export: its directory or hub id.")]
AdapterOption = Annotated[str | None, typer.Option(help="Adapter to put on the model.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or npu.")]
QuantizationOption = Annotated[
    Literal["int8", "nf4"] | None, typer.Option(help="Hold the language model in 8 or 4 bits, by bitsandbytes.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[str] | None, typer.Option(help="Picture to ask about; repeatable.", metavar="<path>")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Film to ask about; repeatable.", metavar="<path>")] = None,
    audio: Annotated[
        list[str] | None, typer.Option(help="Recording to ask about; repeatable.", metavar="<path>")
    ] = None,
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    device: DeviceOption = "auto",
    quantization: QuantizationOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a model about a picture, a film or a recording."""
    loaded, processor = answering.open_model(
        model, adapter=adapter, device=device, quantization=quantization, trust_remote_code=trust_remote_code
    )
    text = mmpeft.answer(
        loaded,
        processor,
        images=image or [],
        videos=video or [],
        audios=audio or [],
        prompt=prompt,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        print_json(
            {"answer": text, "prompt": prompt, "images": image or [], "videos": video or [], "audios": audio or []}
        )
    else:
        human(as_json).print(text, markup=False)


def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(help="Held-out data: LLaVA JSON or JSONL.")],
    media_root: Annotated[Path | None, typer.Option(help="Folder of the pictures; default: the file's own.")] = None,
    adapter: AdapterOption = None,
    metric: Annotated[list[str] | None, typer.Option(help="exact_match, token_f1, anls; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    device: DeviceOption = "auto",
    quantization: QuantizationOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer the questions of a data file and score the answers."""
    loaded, processor = answering.open_model(
        model, adapter=adapter, device=device, quantization=quantization, trust_remote_code=trust_remote_code
    )
    dataset = mmpeft.load_dataset(data, media_root=media_root, processor=processor)
    scores = mmpeft.evaluate_model(
        loaded,
        processor,
        dataset,
        metrics=tuple(metric or ("exact_match", "token_f1", "anls")),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        # Prompts that share a row want attention by segments, which a graph does not have.
        share_media=not answering.is_onnx(model),
    )
    if as_json:
        print_json(scores)
        return
    human(as_json).print(score_table({"": scores}))


def score_table(evaluations: dict[str, dict]) -> Table:
    """Scores by kind of question: a column for each evaluation and metric."""
    table = Table()
    table.add_column("questions")
    table.add_column("count", justify="right")
    columns = [(name, metric) for name, entry in evaluations.items() for metric in entry["metrics"]]
    for name, metric in columns:
        table.add_column(f"{metric} {name}".strip(), justify="right")
    first = next(iter(evaluations.values()))
    for kind, row in first["by_kind"].items():
        cells = [f"{evaluations[name]['by_kind'][kind][metric]:.3f}" for name, metric in columns]
        table.add_row(kind or "(no kind)", str(row["count"]), *cells)
    table.add_section()
    totals = [f"[bold]{evaluations[name]['metrics'][metric]:.3f}" for name, metric in columns]
    table.add_row("[bold]all", str(len(first["predictions"])), *totals)
    return table
