"""The seeded failures and lies of nodes, named as the catalogue names them (docs/faults.md).

`FAULTS` holds what one node may do by itself. With one endpoint those are left out that only another could contradict; with
several, one lies at a time, as the promise says (no answer of one alone). Each is undone after a while; at the end all are.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from indexer.sandbox.partners.faults import FAULTS as PARTNERS
from tests.fake_node import FakeNode

if TYPE_CHECKING:
    from tests.simulation.seeded.world import World

GRACE = 60.0  # seconds within which the truth must have held what was told

Act = Callable[[FakeNode, random.Random], None]


def remember(world: World, error: BaseException) -> None:
    world.struck[f"serve failed: {type(error).__name__}"] += 1


# --------------------------------------------------------------------------- lies about logs, headers and receipts


def _logs(change: Callable[[list[Any], random.Random], list[Any]]) -> Act:
    def act(node: FakeNode, rng: random.Random) -> None:
        node.lie("eth_getLogs", lambda _, logs: change(logs, rng) if logs else logs, times=rng.randint(1, 3))

    return act


def _each(**fields: Any) -> Act:
    """One of the logs, with these fields otherwise."""

    def change(logs: list[Any], rng: random.Random) -> list[Any]:
        at = rng.randrange(len(logs))
        return [
            log | {k: v(log) if callable(v) else v for k, v in fields.items()} if i == at else log
            for i, log in enumerate(logs)
        ]

    return _logs(change)


def _header(change: Callable[[dict[str, Any]], Any], method: str = "eth_getBlockByNumber") -> Act:
    def act(node: FakeNode, rng: random.Random) -> None:
        node.lie(method, lambda _, header: header and change(header), times=rng.randint(1, 3))

    return act


def _receipts(change: Callable[[list[Any]], Any]) -> Act:
    def act(node: FakeNode, rng: random.Random) -> None:
        node.lie("eth_getBlockReceipts", lambda _, found: found and change(found), times=rng.randint(1, 3))

    return act


def _fails(code: int, message: str, *, status: int = 200, method: str = "*") -> Act:
    def act(node: FakeNode, rng: random.Random) -> None:
        node.fail(method, code, message, status=status, times=rng.randint(1, 4))

    return act


def _limits(node: FakeNode, rng: random.Random) -> None:
    code, message = rng.choice(
        [
            (-32005, "query returned more than 10000 results"),
            (-32602, "query exceeds max block range 100"),
            (-32614, "eth_getLogs is limited to a 10,000 range"),
            (-32000, "Log response size exceeded. this block range should work: [0x1, 0x2]"),
            (-32600, "Under the Free tier plan, you can make eth_getLogs requests with up to a 10 block range."),
            (-32602, "Log response size exceeded. this block range should work: [0x9, 0x2]"),
        ]
    )
    node.fail("eth_getLogs", code, message, times=rng.randint(1, 2))


def _proxyd(node: FakeNode, rng: random.Random) -> None:
    code, message, status = rng.choice(
        [
            (-32011, "no backends available for method", 503),
            (-32016, "over rate limit", 429),
            (-32019, "block is out of range", 400),
            (-32020, "no consensus backends", 503),
            (-32010, "too many requests", 429),
        ]
    )
    node.fail("*", code, message, status=status, times=rng.randint(1, 3))


def _future(header: dict[str, Any]) -> dict[str, Any]:
    return header | {"number": hex(int(header["number"], 16) + 1000), "hash": "0x" + "77" * 32}


def _batch(change: Callable[[list[Any]], list[Any]]) -> Act:
    def act(node: FakeNode, rng: random.Random) -> None:
        node.batch_lie = change

    return act


def _cut(name: str, **given: Any) -> Act:
    """A fault of the transport, by its name at FakeNode."""

    def act(node: FakeNode, rng: random.Random) -> None:
        getattr(node, name)("*", times=rng.randint(1, 3), **given)

    return act


def _tags(node: FakeNode, rng: random.Random) -> None:
    node.missing_tag = rng.choice(["null", "-32000", "-32001", "-39001"])
    node.safe = node.finalized = None


def _old_tags(node: FakeNode, rng: random.Random) -> None:
    node.safe, node.finalized = max(0, (node.chain.safe or 0) - 40), max(0, (node.chain.finalized or 0) - 40)


def _high_tags(node: FakeNode, rng: random.Random) -> None:
    node.safe = node.finalized = node.head


def _other_chain(node: FakeNode, rng: random.Random) -> None:
    node.chain_id = 1


def _stuck(node: FakeNode, rng: random.Random) -> None:
    node.move_to(node.chain.fork())


def _minority(node: FakeNode, rng: random.Random) -> None:
    """A branch of its own, from a few blocks ago: it stays behind, or runs ahead."""
    fork = node.chain.fork()
    depth = min(rng.choice([1, 3, 12]), fork.head.number - (fork.finalized or 0) - 1)
    if depth > 0:
        fork.reorganise(depth, [()] * (depth + rng.choice([0, 2, 40])))
        fork.safe = min(fork.safe or 0, fork.head.number - depth)
        node.move_to(fork)


def _stale(node: FakeNode, rng: random.Random) -> None:
    node.lag = rng.choice([1, 4, 20, 80])


def _silent(node: FakeNode, rng: random.Random) -> None:
    node.silent = True


def _same_again(node: FakeNode, rng: random.Random) -> None:
    node.repeat_head()
    node.repeat_head()


def _other_subscription(node: FakeNode, rng: random.Random) -> None:
    for socket in node.subscriptions:
        node.subscriptions[socket] = hex(rng.getrandbits(32))


def _nonsense(node: FakeNode, rng: random.Random) -> None:
    node.send_raw(rng.choice(["{", "[]", '{"jsonrpc":"2.0","method":"eth_subscription","params":{"result":{}}}']))


def _shuffled(logs: list[Any], rng: random.Random) -> list[Any]:
    rng.shuffle(logs)
    return logs


#: What a single endpoint may do, and must be survived.
ALONE: Mapping[str, Act] = {
    "F01 stale head": _stale,
    "F03 head from the future": _header(_future),
    "F20 tags missing": _tags,
    "F21 tags regress": _old_tags,
    "F30 empty logs": _logs(lambda logs, rng: []),
    "F32 truncated logs": _logs(lambda logs, rng: logs[: len(logs) // 2]),
    "F33 a log dropped": _logs(lambda logs, rng: logs[:-1] if len(logs) < 2 else logs[:1] + logs[2:]),
    "F34 the last block missing": _logs(lambda logs, rng: [x for x in logs if x["blockNumber"] != logs[-1]["blockNumber"]]),
    "F35 duplicate logs": _logs(lambda logs, rng: logs + logs[:1]),
    "F36 shuffled logs": _logs(_shuffled),
    "F37 a log outside the range": _each(blockNumber=lambda log: hex(int(log["blockNumber"], 16) + 5000)),
    "F38 a log of another filter": _each(address="0x" + "99" * 20),
    "F39 wrong block hash": _each(blockHash="0x" + "ab" * 32),
    "F40 wrong transaction": _each(transactionHash="0x" + "cd" * 32),
    "F41 log index underflow": _each(logIndex="0xffffffff"),
    "F42 removed log": _each(removed=True),
    "F43 odd data": _each(data=lambda log: log["data"][:-1]),
    "F44 topics cut": _each(topics=lambda log: log["topics"][:1]),
    "F50 null block": _header(lambda header: None),
    "F52 hash unknown": _header(lambda header: None, "eth_getBlockByHash"),
    "F51 null receipts": _receipts(lambda found: None),
    "F53 header hash wrong": _header(lambda header: header | {"gasUsed": "0x77"}),
    "F54 zero bloom": _header(lambda header: header | {"logsBloom": "0x" + "00" * 256}),
    "F55 parent broken": _header(lambda header: header | {"parentHash": "0x" + "ee" * 32}),
    "F56 receipts missing": _receipts(lambda found: found[:-1]),
    "F60 rate limited": _fails(-32005, "rate limit exceeded", status=429),
    "F60 rate limited in 200": _fails(429, "Too Many Requests"),
    "F61 billing": _fails(-32000, "monthly quota exceeded", status=402),
    "F62 proxyd": _proxyd,
    "F63 range refused": _limits,
    "F65 block too large": _fails(-32005, "query returned more than 10000 results", method="eth_getLogs"),
    "F66 no answer": _cut("hang"),
    "F67 slow drip": _cut("drip", every=0.1),
    "F68 reset in the body": _cut("reset"),
    "F69 half a JSON": _cut("truncate"),
    "F70 HTML": lambda node, rng: node.reply("*", "<html><title>hello</title></html>", times=2) and None,
    "F71 broken gzip": _cut("bad_gzip"),
    "F72 batch loses an answer": _batch(lambda answers: answers[1:]),
    "F72 batch reordered": _batch(lambda answers: answers[::-1]),
    "F73 another request's id": _batch(lambda answers: [each | {"id": 987_654} for each in answers]),
    "F76 another chain": _other_chain,
    "F80 silent socket": _silent,
    "F81 duplicate heads": _same_again,
    "F84 another subscription": _other_subscription,
    "F85 nonsense on the socket": _nonsense,
}  # fmt: skip

#: What another endpoint contradicts.
AMONG_OTHERS: Mapping[str, Act] = {
    "F04 stuck node": _stuck,
    "F05 minority fork": _minority,
    "F22 tags too high": _high_tags,
}

#: What takes the event loop to do: in `sicken`.
BY_HAND = ("F85 sockets closed", "F68 sockets cut", "F75 connection refused", "F77 all endpoints down")

FAULTS: tuple[str, ...] = (*ALONE, *AMONG_OTHERS, *BY_HAND)


RECEIVERS = (
    "F120 taken, and never answered",
    "F122 asked to wait",
    "F123 redirected",
    "F124 slow answer",
    "F125 taken with an error's body",
    "500 from the receiver",
    "dropped by the receiver",
)

#: How often each is chosen, beside the others.
OF_THE_CHAIN: Mapping[str, int] = {
    "F06 reorganisation, one": 5,
    "F06 reorganisation, two": 3,
    "F06 reorganisation, ten": 3,
    "F06 reorganisation, deep": 1,
    "F07 there and back": 2,
    "F12 a shorter chain": 2,
    "F09 two reorganisations": 2,
    "F14 the chain halts": 1,
    "F15d created and used in one block": 4,
    "F13 replaced at the same height": 2,
}

OF_PROCESSES = (
    "F90 killed",
    "F90 killed at COMMIT",
    "F90 killed in a transaction",
    "F91 COMMIT lost",
    "F91 COMMIT unacknowledged",
    "F91 a session ends",
    "F92 serialization failure",
    "F92 deadlock",
    "F94 frozen",
    "F94 frozen in a transaction",
    "F94 a lease lapses",
    "F95 two leaders",
    "F96 disk full",
)

OF_THE_BRAND = ("registered late", "other terms", "cancelled", "stopped in good order")

OF_PARTNERS = tuple(f"{code} {name}" for name, code in PARTNERS.items() if name != "endless_body")

#: Everything that a seed may make happen, by name.
NAMES = frozenset((*FAULTS, *RECEIVERS, *OF_THE_CHAIN, *OF_PROCESSES, *OF_THE_BRAND, *OF_PARTNERS))


async def sicken(world: World, until: float) -> None:
    """One node after the other, now and then; each is well again before the next falls ill."""
    rng = world.illness
    several = len(world.nodes) > 1
    names = [*ALONE, *BY_HAND, *(AMONG_OTHERS if several else ())]
    if world.liar is not None:  # one lies at a time: the others only fail
        names = [name for name in names if name[:2] in ("F6", "F8") or name[:3] in ("F75", "F77")]
    pause = rng.choice([2.0, 5.0, 12.0]) / world.chaos
    while world.loop.now < until:
        await asyncio.sleep(rng.expovariate(1 / pause))
        node, name = rng.choice([node for node in world.nodes if node is not world.liar]), rng.choice(names)
        await inflict(world, node, name)


async def inflict(world: World, node: FakeNode, name: str) -> None:
    """One node's trouble, from its beginning to its end."""
    rng = world.illness
    world.strike(name)
    world.loop.note(name, node.port)
    if name == "F85 sockets closed":
        await node.close_sockets(rng.choice([1001, 1011]))
    elif name == "F68 sockets cut":
        await node.abort_sockets()
    elif name in ("F75 connection refused", "F77 all endpoints down"):
        down = world.nodes if name[:3] == "F77" else [node]
        for each in down:
            await each.stop()
        await asyncio.sleep(rng.choice([0.5, 5.0, 30.0]))
        for each in down:
            await each.start()
    else:
        (ALONE.get(name) or AMONG_OTHERS[name])(node, rng)
        await asyncio.sleep(rng.choice([0.3, 2.0, 8.0]))
        await recover(world, node)


# --------------------------------------------------------------------------- one that lies all along


def _one_in_three(log: dict[str, Any]) -> bool:
    """The same logs each time."""
    return int(log["blockHash"][-4:], 16) % 3 == 0


def _withholds(node: FakeNode) -> None:
    node.lie("eth_getLogs", lambda _, logs: [log for log in logs if not _one_in_three(log)], times=None)


def _forged(log: dict[str, Any]) -> dict[str, Any]:
    """A movement with another holder: the receipts' root does not know of it."""
    if not _one_in_three(log) or len(log["data"]) < 2 + 64 * 5:
        return log
    return log | {"data": log["data"][: 2 + 64 + 24] + "99" * 20 + log["data"][2 + 64 * 2 :]}


def _forges(node: FakeNode) -> None:
    node.lie("eth_getLogs", lambda _, logs: [_forged(log) for log in logs], times=None)
    node.lie(
        "eth_getBlockReceipts",
        lambda _, found: found and [each | {"logs": [_forged(log) for log in each["logs"]]} for each in found],
        times=None,
    )


def _promises(node: FakeNode) -> None:
    """Its safe and finalized blocks are its latest."""
    node.lie(
        "eth_getBlockByNumber",
        lambda _, __: node.chain.header(node.chain.canonical[node.head]),
        times=None,
        when=lambda params: params[0] in ("safe", "finalized"),
    )


async def deceive(world: World, name: str, until: float) -> None:
    """One node of several lies in one way as long as the story lasts: by itself, whatever it says, it moves nothing."""
    rng = random.Random(f"liar {world.seed}")
    node = world.liar = world.nodes[0] if rng.random() < 0.6 else rng.choice(world.nodes)
    world.strike(name)
    world.loop.note("lies all along", name, node.port)
    if name.startswith("F22"):
        _promises(node)
    elif name.startswith("F33"):
        _withholds(node)
    elif name.startswith("F40"):
        _forges(node)
    elif name.startswith("F01"):
        node.lag = rng.choice([3, 15, 60])
    while name.startswith("F05") and world.loop.now < until:
        await asyncio.sleep(rng.choice([1.0, 3.0, 6.0]))
        if _dreams(world, node, rng):
            await asyncio.sleep(rng.choice([1.0, 4.0, 9.0]))
            node.move_to(world.story.chain)


def _dreams(world: World, node: FakeNode, rng: random.Random) -> bool:
    """A branch of its own, on which has happened what somebody waits for."""
    fork = node.chain.fork()
    deepest = world.story.depth_of_an_event(rng)
    depth = min(rng.choice([0, 0, 0, deepest, deepest]), fork.head.number - (fork.finalized or 0) - 1)
    if depth < 0:
        return False
    blocks: list[list[Any]] = [[] for _ in range(depth + rng.choice([1, 3, 30]))]
    for log in world.story.wishes():
        rng.choice(blocks).append(log)
    fork._cut(len(fork.canonical) - depth)
    fork._salt += rng.randrange(1_000_000)
    for logs in blocks:
        fork.mine(logs)
    fork.safe = min(fork.safe or 0, fork.head.number - len(blocks))
    node.move_to(fork)
    node.repeat_head()
    return True


async def recover(world: World, node: FakeNode) -> None:
    """A node without faults, on the true chain."""
    node.heal()
    node.lag, node.safe, node.finalized, node.missing_tag = 0, -1, -1, "null"
    node.chain_id = world.story.chain.chain_id
    if node.chain is not world.story.chain:
        node.move_to(world.story.chain)
    if node._runner is None:
        await node.start()
