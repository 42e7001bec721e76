"""Lists of prompts, each read once: the rows of a table share theirs."""

import functools

from vqdm.config.options import PromptsConfig
from vqdm.prompts import PromptList, load_prompts

_load = functools.lru_cache(maxsize=8)(load_prompts)


def read_prompts(config: PromptsConfig) -> PromptList:
    return _load(
        source=config.source,
        path=config.path,
        column=config.column,
        n=config.n,
        order=config.order,
        seed=config.seed,
        split=config.split,
        sha256=config.sha256,
    )
