"""The commit that a manifest names, against git itself."""

import subprocess

import pytest
from tiny_world import ROOT

from vqdm.runs import provenance


def test_the_commit_is_that_of_the_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    state = provenance.git_state()
    assert state["git_sha"] == head.strip() and isinstance(state["dirty"], bool)


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.git_state.__wrapped__() == {"git_sha": None, "dirty": None}
