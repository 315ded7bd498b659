"""Floating-point operations that a case cannot do without.

Useful FLOP are those of the exact computation on the tokens that mmpeft computes, that is, without padding and with
what samples on a picture share taken once:

    language model    4 x weights of its matrices x tokens         forward, and backward to the layers' inputs
    head              4 x hidden x vocabulary x labelled tokens
    projector         4 x its weights x picture tokens             forward, and backward to its own weights
    vision tower      2 x weights of its matrices x patches        forward, of each picture once in the whole run

Weights that are frozen have no gradient of their own. Attention's products (under 4 % here), LoRA's and all that is not
a matrix product are left out, so a share of the matrix product's rate is a lower bound. The same work counts for every
program: what one computes beyond it is time, not work.
"""

from typing import Any

from workload.cases import Case, make_rows
from workload.shapes import SIZES


def useful_flops(case: Case, size: str, figures: dict[str, Any], *, epochs: int) -> float:
    """Of a whole run of a case.

    Args:
        figures: what mmpeft's `stage.json` says of it: `tokens_computed`.
        epochs: that the run had.
    """
    decoder, tower = SIZES[size][case.model]
    rows = make_rows(case)
    pictures = len({name for row in rows for name in row["images"]})
    # A picture that several samples of a step share goes through the projector once.
    shown = sum(
        len({name for row in rows[start : start + case.batch] for name in row["images"]})
        for start in range(0, case.samples, case.batch)
    )
    patches = (tower.side // tower.patch) ** 2
    matrices = 4 if case.model == "llava" else 5  # attention counts as 4 squares of `hidden`; Qwen's MLP has a gate
    tower_weights = tower.layers * (4 * tower.hidden**2 + (matrices - 2) * tower.hidden * tower.intermediate)
    if case.model == "llava":
        tokens = patches
        projector = tower.hidden * decoder.hidden + decoder.hidden**2
        tower_weights = tower_weights * (tower.layers - 1) // tower.layers  # LLaVA takes the last layer but one
    else:
        tokens = patches // 4
        projector = 16 * tower.hidden**2 + 4 * tower.hidden * decoder.hidden
    head = sum(len(row["answer"]) + 1 for row in rows)
    return (
        4.0 * decoder_weights(case, size) * figures["tokens_computed"]
        + 4.0 * decoder.hidden * decoder.vocabulary * head * epochs
        + 4.0 * projector * tokens * shown * epochs
        + 2.0 * tower_weights * patches * pictures
    )


def products(case: Case, size: str) -> list[tuple[int, int]]:
    """Shapes of the matrices of one layer of the language model."""
    decoder, _ = SIZES[size][case.model]
    hidden, narrow = decoder.hidden, decoder.hidden // decoder.heads * decoder.kv_heads
    feed = decoder.intermediate
    return [
        (hidden, hidden),
        (hidden, narrow),
        (hidden, narrow),
        (hidden, hidden),
        *[(hidden, feed)] * 2,
        (feed, hidden),
    ]


def decoder_weights(case: Case, size: str) -> int:
    """Numbers in all matrices of the language model's layers."""
    decoder, _ = SIZES[size][case.model]
    return decoder.layers * sum(rows * columns for rows, columns in products(case, size))
