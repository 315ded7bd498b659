"""`mmpeft data convert PATH OUT --to FORMAT`."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mmpeft.cli.output import JsonOption, err, human, print_json
from mmpeft.cli.sources import ColumnOption, QuestionOption, SourceArgument, column_map
from mmpeft.core.lazy import LazyModule

converting = LazyModule("mmpeft.data.convert")
formats = LazyModule("mmpeft.data.formats")


class Format(StrEnum):
    """What can be written; the same names as `mmpeft.data.convert.TARGETS`."""

    LLAVA = "llava"
    MESSAGES = "messages"
    SWIFT = "swift"
    LLAMAFACTORY = "llamafactory"
    CSV = "csv"
    PARQUET = "parquet"
    WEBDATASET = "webdataset"
    FOLDER = "folder"


def convert(
    path: SourceArgument,
    out: Annotated[Path, typer.Argument(help="File to write; for webdataset and folder a new folder.")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    media_root: Annotated[Path | None, typer.Option(help="Folder of the media; default: the source's own.")] = None,
    column: ColumnOption = None,
    question: QuestionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a data source in another format; a row that the format cannot hold is named, and nothing is written."""
    columns = column_map(column)
    source = formats.describe(path, columns=columns, question=question)
    done = converting.convert_data(path, out, to.value, media_root=media_root, columns=columns, question=question)
    for key, count in done.ignored.items():
        err.print(Text(f"warning: the key {key!r} of {count} rows is not known and was not written"), soft_wrap=True)
    if as_json:
        print_json({"source": asdict(source), "to": to.value, **asdict(done)})
        return
    console = human(as_json)
    console.print(f"read {source}", markup=False, soft_wrap=True)
    console.print(f"wrote {done.samples} samples to {' and '.join(done.files)}", markup=False, soft_wrap=True)
    if done.modalities and done.media_root != str(out.parent) and to not in (Format.WEBDATASET, Format.FOLDER):
        note = f"its media stay where they are: use it with media_root {done.media_root}"
        console.print(note, markup=False, soft_wrap=True)
