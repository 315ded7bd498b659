"""The first samples of a data file as plain values, for people to look at."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from mmpeft.core.files import write_text
from mmpeft.data.formats import read_rows, source_root
from mmpeft.data.pictures import read_picture
from mmpeft.data.types import Sample


def describe_samples(
    path: str | os.PathLike[str],
    media_root: str | os.PathLike[str] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a data source as plain values: a sample with its pictures' sizes, or `error`: why it is none.

    `columns` and `question` are as `mmpeft.data.formats.read_rows` takes them.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else source_root(path)
    for row in read_rows(path, columns=columns, question=question):
        if row.sample is not None:
            yield _described(row.sample, root)
        elif row.problem is not None:
            yield {"index": row.problem.index, "line": row.problem.line, "error": row.problem.located(path)}


def _described(sample: Sample, root: Path) -> dict[str, Any]:
    pictures = [(name, read_picture("header", root, name)) for name in sample.images]
    return asdict(sample) | {
        "images": [
            {"name": name, "error": found}
            if isinstance(found, str)
            else {"name": name, "width": found[0], "height": found[1]}
            for name, found in pictures
        ]
    }


def write_page(out: Path, name: str, samples: Sequence[Mapping[str, Any]], *, epoch: int | None = None) -> None:
    """Write samples that `view_samples` gave as one HTML file; all text is escaped, scripts and requests forbidden.

    Args:
        epoch: for which the samples are augmented; None if they are not.

    Raises:
        OutputError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmpeft.data", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    write_text(out, environment.get_template("show.html.j2").render(name=name, samples=samples, epoch=epoch))
