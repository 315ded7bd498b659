"""What transformers' Trainer is kept from doing when it is made."""

import contextlib
import logging
from collections.abc import Iterator

from transformers import TrainingArguments

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def optimizer_whole(args: TrainingArguments | None) -> Iterator[None]:
    """Let a Trainer be made that checkpoints a model whose layers are shared out.

    transformers 5.24 refuses it, for the optimizer's states may be shared out as well. Here what trains in such a
    model is whole in every process (`mmpeft.models.sharded`), and so are they.
    """
    if args is None or args.save_only_model:
        yield
        return
    args.save_only_model = True
    try:
        yield
    finally:
        args.save_only_model = False


def one_device(args: TrainingArguments | None) -> None:
    """Train on one device a process: `DataParallel`, which the Trainer takes on several, cuts packed rows apart."""
    if args is not None and args.n_gpu > 1:
        logger.warning(
            "%d devices are here, and this process trains on one; `accelerate launch -m mmpeft run RECIPE` uses all",
            args.n_gpu,
        )
        args._n_gpu = 1
