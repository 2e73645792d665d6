"""What commands print for people, where a wrong line would mislead somebody at night."""

from __future__ import annotations

from typing import Any

import pytest

from indexer import terminal
from indexer.terminal import latch_text


def test_a_finality_violation_is_shown_with_both_sides_and_who_shows_each() -> None:
    ours = {"number": 12, "hash": "0xaa", "endpoints": ["one.example"]}
    theirs = {"number": 12, "hash": "0xbb", "endpoints": ["two.example", "three.example"]}
    text = latch_text({"ours": ours, "theirs": theirs, "at": "2026-11-21T10:00:00+00:00"})
    assert text.splitlines() == [
        "  we hold   block 12 0xaa, shown by one.example",
        "  the other block 12 0xbb, shown by two.example, three.example",
        "  since     2026-11-21T10:00:00+00:00",
    ]
    alone = latch_text({"ours": {**ours, "endpoints": []}, "theirs": theirs, "at": ""})
    assert "block 12 0xaa, shown by no endpoint that was asked" in alone


def test_no_brand_or_issuer_paints_on_the_operators_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reference = "[/bold] [red]order[/red] \u202e7"
    operation = {"id": "1", "brand": "bloom", "reference": reference, "status": "pending", "registeredAt": "now"}
    page: dict[str, Any] = {"data": [{**operation, "generation": 0}]}
    terminal.answer(page, False, terminal.operations_text)
    assert "[/bold] [red]order[/red] \\u202e7" in capsys.readouterr().out
    programme = {"chainId": "1", "issuer": "0x", "expiresAt": "0", "balance": "5", "source": "loyfin"}
    named = {**programme, "name": "\x1b]0;owned\x07[b]", "symbol": "\x9b2J", "historyComplete": True}
    terminal.answer({"data": [named], "partners": []}, False, terminal.balances_text)
    assert "\\x1b]0;owned\\x07[b] (\\x9b2J)" in capsys.readouterr().out
    terminal.answer(None, False, lambda _: "two\nlines of a partner: \x1b[2J[/b]")
    assert capsys.readouterr().out == "two\nlines of a partner: \\x1b[2J[/b]\n"
    terminal.complain("no operation '\x1b[2J'")
    assert capsys.readouterr().err == "indexer: no operation '\\x1b[2J'\n"


def test_ids_and_cursors_in_lists_can_be_copied(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = "8e09e343-c834-5984-9122-c9c7c6d2d63f"
    row = {
        "id": ids,
        "brand": "bloom",
        "reference": "r" * 200,
        "status": "pending",
        "generation": 0,
        "registeredAt": "t" * 27,
    }
    page = {"data": [row], "nextCursor": "c" * 120}
    terminal.answer(page, False, terminal.operations_text)
    piped = capsys.readouterr().out.splitlines()
    assert len(piped) == 3 and ids in piped[1] and "r" * 200 in piped[1] and piped[2] == "more: --cursor " + "c" * 120
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    terminal.answer(page, False, terminal.operations_text)
    seen = capsys.readouterr().out
    assert ids in seen and "c" * 120 in seen and "r" * 200 not in seen
