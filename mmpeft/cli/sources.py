"""How commands are told what a data source is."""

from pathlib import Path
from typing import Annotated

import typer

SourceArgument = Annotated[
    Path,
    typer.Argument(
        help="JSON, JSONL, CSV, TSV or parquet; a folder of pictures, shards or a saved data set; hf://owner/name."
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="OURS=THEIRS", help="What a column is called, such as question=frage; repeatable."
    ),
]
QuestionOption = Annotated[
    str | None, typer.Option(help="What the user says where rows hold only a picture and a caption.")
]


def column_map(values: list[str] | None) -> dict[str, str] | None:
    """`["question=frage"]` as `{"question": "frage"}`."""
    columns = {}
    for value in values or ():
        ours, found, theirs = value.partition("=")
        if not (found and ours and theirs):
            raise typer.BadParameter(f"found {value!r}; expected OURS=THEIRS, such as question=frage")
        columns[ours] = theirs
    return columns or None
