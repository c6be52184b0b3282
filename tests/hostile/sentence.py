"""What an error must look like to its reader."""

from __future__ import annotations

import re

from fusedisk.core.errors import FusediskError

LONGEST = 600


def assert_sentence(error: BaseException, *names: object) -> None:
    """``error`` is one of ours, one readable sentence, and names everything in ``names``."""
    assert isinstance(error, FusediskError), repr(error)
    text = str(error)
    assert text
    assert len(text) <= LONGEST, text
    assert text.isprintable(), repr(text)
    assert not re.search(r"[a-z)'][.!?] [A-Z]", text), f"more than one sentence: {text}"
    for name in names:
        assert str(name) in text, f"{name} is not named: {text}"
