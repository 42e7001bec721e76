"""Prompts from a file, from the list shipped with vqdm, or from the tiny world: checked, hashed, in a known order.

A shorter list is a prefix of a longer one, so images and calibration data can be extended. Imports no torch.
"""

from vqdm.prompts.images import ImageList
from vqdm.prompts.lists import TINY_LENGTH, Prompt, PromptList, load_prompts, prompt_list
from vqdm.prompts.tokens import one_line, token_report

__all__ = [
    "TINY_LENGTH",
    "ImageList",
    "Prompt",
    "PromptList",
    "load_prompts",
    "one_line",
    "prompt_list",
    "token_report",
]
