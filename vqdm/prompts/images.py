"""Order of the images of some prompts: prompt after prompt, each with its copies. Nothing else knows this order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageList:
    """Images in the order in which they are made, stored and scored, as (prompt, number of the copy).

    prompts: of any kind, such as `range(n)` where only their number is known.
    """

    prompts: Sequence[Any]
    copies: int = 1

    def __len__(self) -> int:
        return len(self.prompts) * self.copies

    def __getitem__(self, index: int) -> tuple[Any, int]:
        prompt, copy = self.place(range(len(self))[index])
        return self.prompts[prompt], copy

    def __iter__(self):
        return ((prompt, copy) for prompt in self.prompts for copy in range(self.copies))

    def place(self, index: int) -> tuple[int, int]:
        """(number of the prompt, number of the copy) of the image at `index`."""
        return divmod(index, self.copies)

    def by_prompt(self, values):
        """One row for every prompt: an array or tensor [images, …] as [prompts, copies, …]."""
        return values.reshape(len(self.prompts), self.copies, *values.shape[1:])
