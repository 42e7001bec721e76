"""A stage of an experiment: everything that its output depends on, and the fingerprint of that."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

from vqdm.runs.files import canonical_json
from vqdm.runs.texts import is_file_name


@dataclass(frozen=True)
class Stage:
    """Everything a stage's output depends on. `label` is for people and not hashed; no devices or paths here.

    `config` can be written as JSON. An upstream that is a string is itself an identity, such as a hash of files.
    """

    name: str
    version: int
    label: str
    config: dict
    upstream: dict[str, "Stage | str"] = field(default_factory=dict)

    def __post_init__(self):
        for part in (self.name, self.label):
            if not is_file_name(part):
                raise ValueError(f"stage {self.name!r}, label {self.label!r}: {part!r} cannot be a directory's name")

    @cached_property
    def identity(self) -> dict:
        """Everything that is hashed, in full, as plain JSON values."""
        upstream = {key: up if isinstance(up, str) else up.fingerprint for key, up in self.upstream.items()}
        described = {"stage": self.name, "version": self.version, "config": self.config, "upstream": upstream}
        return json.loads(canonical_json(described))

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.identity)

    @property
    def short(self) -> str:
        return self.fingerprint[:8]

    @property
    def directory_name(self) -> str:
        return f"{self.label}-{self.short}"


def fingerprint_of(identity: dict) -> str:
    return hashlib.sha256(canonical_json(identity)).hexdigest()
