"""What commands print for people, where a wrong line would mislead somebody at night."""

from __future__ import annotations

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
