"""Token counts of prompts, and how much of them a text encoder does not see."""

from collections.abc import Iterable
from typing import Any

from vqdm.prompts.lists import PromptList


def token_report(prompts: PromptList | Iterable[str], tokenizer: Any, max_length: int) -> dict[str, int]:
    """Counts of tokens in the prompts, of unknown ones, and of those that a text encoder of `max_length` does not see.

    Start and end tokens are not counted. CLIP's end token is also its unknown token, but CLIP works on bytes and knows
    every text: there `unknown` is 0.
    """
    texts = prompts.texts if isinstance(prompts, PromptList) else list(prompts)
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for content beside the tokenizer's special tokens")
    # verbose=False: no warning for each prompt that is too long, they are counted here
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"] if texts else []
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    cut = [len(row) - room for row in ids if len(row) > room]
    return {
        "prompts": len(texts),
        "tokens": sum(map(len, ids)),
        "unknown": 0 if unknown is None else sum(row.count(unknown) for row in ids),
        "truncated_prompts": len(cut),
        "truncated_tokens": sum(cut),
    }


def one_line(report: dict[str, int]) -> str:
    """A `token_report` as a line for people."""
    text = f"{report['prompts']} prompts, {report['tokens']} tokens, {report['unknown']} unknown"
    if not report["truncated_prompts"]:
        return f"{text}, none truncated"
    return f"{text}, {report['truncated_prompts']} prompts truncated by {report['truncated_tokens']} tokens in all"
