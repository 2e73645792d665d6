"""When the follower waits, and when it goes on at once: who listens has nothing to do before a head is announced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from indexer.chain.follower import FAR, _Follower


def follower(**left: Any) -> _Follower:
    """One whose last poll left undone what `left` says."""
    counting = SimpleNamespace(counting=lambda _: None)
    lead = SimpleNamespace(time_s=0)
    source = SimpleNamespace(count=None, pool=counting, lead=lead)
    cursor = SimpleNamespace(number=1000)
    position = SimpleNamespace(gatherer=None, cursor=cursor, cursor_time_s=0)
    made = _Follower(cast(Any, SimpleNamespace(socket_name="socket")), cast(Any, source), cast(Any, position))
    for name, value in {"_latest": 1000, **left}.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("left", [{"_owed": True}, {"_latest": None}, {"_latest": 1001 + FAR}])
def test_what_a_poll_left_undone_hurries_polls_and_not_who_listens(left: dict[str, Any]) -> None:
    """No head, and nothing asked: a step that does nothing and waits for nothing would be made again without end."""
    made = follower(**left)
    assert made.behind(listening=False)
    assert not made.behind(listening=True)
    made._heads.append(cast(Any, SimpleNamespace(number=1001)))
    assert made.behind(listening=True) and made.behind(listening=False)


def test_who_has_seen_the_newest_block_waits() -> None:
    assert not follower().behind(listening=False)
