"""A tiny real model of every first-class family, with its real processor."""

from tests.families.qwen import QWEN
from tests.families.tiled import TILED, tiny_idefics3
from tests.tiny import tiny_llava, tiny_processor


def tiny_llava_family():
    processor = tiny_processor()
    return tiny_llava(processor), processor


FIRST_CLASS = {"llava": tiny_llava_family, **QWEN, **TILED}

MODELS = {**FIRST_CLASS, "idefics3": tiny_idefics3}
"""Those, and a second model type where a family has two unlike ones."""

SINGLE_TURN = {"paligemma"}
"""Families that answer one question about pictures, without a conversation."""

ENCODED_TOGETHER = {"llava_onevision"}
"""Families in which a picture takes another number of tokens beside a second one."""
