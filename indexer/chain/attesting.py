"""Proof before signal: for each block with an event that an operation claims, who holds it, and what its receipts prove.

Promises that an endpoint counts as a witness only where it showed that very hash at that height, that `receipts_root` is said only
where all receipts of the block make the root that its header commits to, and that the stored events of the block are then those of the
proven receipts: what differs is put right. A call or two per claimed block, within `verify_calls_per_second`; none for others. What
it is all worth is the reconciler's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import structlog

from indexer.chain import witnesses
from indexer.chain.emitters import load_speakers
from indexer.chain.integrity import Lie, proven_logs, verify_header
from indexer.chain.linkage import Unsettled
from indexer.chain.logs import timed
from indexer.chain.pool import Node
from indexer.chain.reading import Task
from indexer.chain.rpc_errors import MethodMissing, RpcError
from indexer.chain.schedule import WrongChain
from indexer.chain.wire import RawLog
from indexer.model.types import Hash32, Header, Schedule
from indexer.store import attestations, chains, facts, stored
from indexer.store.attestations import Open

UNPROVABLE: Final = (
    300.0  # seconds until what could not be verified is tried again: another version or plan may be able to
)
AT_ONCE: Final = 20  # blocks between two looks at what waits
BURST: Final = 20  # calls that may be made at once, after a quiet time
IDLE: Final = 5.0  # seconds between looks for questions, when nothing is heard

log = structlog.get_logger(__name__)

Proof = Literal["receipts_root", "cannot_verify"]


@dataclass(frozen=True, slots=True)
class Proven:
    """What the receipts of a block came to; `logs` of all emitters, where they could be had at all."""

    proof: Proof | None
    reason: str | None
    header: Header | None = None
    logs: Sequence[RawLog] = ()


class Budget:
    """So many calls a second on average, and BURST at once. By the event loop's clock."""

    def __init__(self, rate: float) -> None:
        self._rate, self._left, self._at = rate, float(BURST), 0.0

    async def spend(self, calls: int) -> None:
        now = asyncio.get_running_loop().time()
        self._left = min(float(BURST), self._left + (now - self._at) * self._rate) - calls
        self._at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / self._rate)


async def attest(task: Task) -> None:
    """Answers what is asked about blocks, until cancelled or until the lease is lost. Raises WrongChain."""
    attester = _Attester(task)
    while True:
        conn = task.lease.connection
        open_ones = await attestations.due(conn, task.chain.chain_id, AT_ONCE)
        if open_ones:
            await attester.look(open_ones)
        if not open_ones:
            pause = await attestations.seconds_to_next(conn, task.chain.chain_id)
            await task.wakeups.wait("asked", IDLE if pause is None else min(IDLE, pause))


class _Attester:
    def __init__(self, task: Task) -> None:
        self._task, self._source, self._pool = task, task.source, task.source.pool
        self._budget = Budget(task.chain.verify_calls_per_second)

    async def look(self, open_ones: Sequence[Open]) -> None:
        """One look at each of these blocks, all at once."""
        self._source.reconsider()
        state = await chains.load_chain(self._task.lease.connection, self._task.chain.chain_id)
        schedule = None if state is None else state.schedule
        if state is not None:
            self._pool.genesis = state.genesis_hash or self._pool.genesis
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ask(found, schedule)) for found in open_ones]
        for found, answer in zip(open_ones, asked, strict=True):
            await self._store(found, *answer.result(), schedule)

    async def _ask(self, found: Open, schedule: Schedule | None) -> tuple[list[str], Proven]:
        """The endpoints' part."""
        demanded = self._task.chain.proof
        if found.proof == "receipts_root" or (found.proof == "cannot_verify" and demanded != "required"):
            return await self._witnesses(found), Proven(_known(found.proof), None)
        if demanded == "off":
            return await self._witnesses(found), Proven(None, None)
        async with asyncio.TaskGroup() as group:  # neither waits for the other: a signal may wait for both
            seen = group.create_task(self._witnesses(found))
            proven = group.create_task(self._prove(Hash32(found.block[2]), schedule))
        return seen.result(), proven.result()

    async def _store(self, found: Open, seen: list[str], proven: Proven, schedule: Schedule | None) -> None:
        """What they said, with what it puts right."""
        task, (chain_id, number, _) = self._task, found.block
        enough = self._pool.quorum == 1 or len(seen) >= self._pool.quorum
        unprovable = proven.proof == "cannot_verify"
        settled = enough and (
            proven.proof == "receipts_root"
            or (unprovable and task.chain.proof == "where_possible")
            or task.chain.proof == "off"
        )
        repair = await self._differences(proven, schedule)
        async with task.lease.transaction() as conn:
            known = await attestations.record(
                conn,
                found,
                seen,
                proven.proof,
                proven.reason,
                settled=settled,
                pause=UNPROVABLE if enough and unprovable else None,
            )
            if repair is not None:
                rows, withdraw = repair
                await facts.commit_range(
                    conn, chain_id, rows=rows, covered=(), withdraw=withdraw, repair=True, touch=(number, number)
                )
            elif known:
                await facts.touch(conn, chain_id, number, number)
        if known or repair is not None:
            task.wakeups.poke("facts")
        self._tell(found, proven, repair is not None)

    # --------------------------------------------------------------------- witnesses

    async def _witnesses(self, found: Open) -> list[str]:
        """Who was seen to hold the block, in all looks; with one witness needed, whoever it was read from is it."""
        quorum, (_, number, block_hash) = self._pool.quorum, found.block
        seen = list(found.witnesses)
        if quorum == 1:
            return seen
        # the best first, as many as are missing; then the rest, if some of those do not hold it. Who fails or is slow comes last
        left = [node for node in (self._source.lead, *self._source.others) if node.name not in seen]
        left.sort(key=lambda node: not self._pool.live(node) or self._pool.slow(node))
        while len(seen) < quorum and left:
            asked, left = left[: quorum - len(seen)], left[quorum - len(seen) :]
            await self._budget.spend(len(asked))
            shown = await witnesses.shown(self._pool, number, [node for node in asked if await self._is_ours(node)])
            seen += [node.name for node in shown.get(Hash32(block_hash), [])]
        return seen

    async def _is_ours(self, node: Node) -> bool:
        try:
            async with asyncio.timeout(witnesses.ASK_SECONDS):
                await self._pool.identify(node)
        except (WrongChain, RpcError, TimeoutError):
            return False
        return True

    # --------------------------------------------------------------------- proof

    async def _prove(self, block_hash: Hash32, schedule: Schedule | None) -> Proven:
        """By the first endpoint whose receipts of the block prove themselves. Without a proof: None (asked again soon), or
        `cannot_verify` where as many as must agree say that there is none to be had: one alone could make it so."""
        reasons: list[str] = []
        missing: list[str] = []
        unknowable: list[str] = []
        nodes = [self._source.lead, *self._source.others]

        async def proven(node: Node) -> Proven:
            await self._budget.spend(1 if self._pool.kept(block_hash) else 2)
            return await self._proven_by(node, block_hash, schedule)

        for node in nodes:
            try:
                return await (self._source.ask(proven) if node is self._source.lead else proven(node))
            except MethodMissing:
                node.no_receipts = True
                missing.append(f"{node.name} offers no eth_getBlockReceipts")
            except Unprovable as why:
                unknowable.append(f"{node.name}: {why}")
            except (RpcError, Lie, Unsettled) as error:
                reasons.append(str(error))
        if len(missing) == len(nodes):
            return Proven("cannot_verify", "no endpoint offers eth_getBlockReceipts")
        agreed = len(missing) + len(unknowable) >= self._pool.quorum
        return Proven("cannot_verify" if agreed else None, "; ".join([*unknowable, *missing, *reasons])[:500])

    async def _proven_by(self, node: Node, block_hash: Hash32, schedule: Schedule | None) -> Proven:
        count = self._pool.counting(node.name)
        if (header := self._pool.kept(block_hash)) is not None:  # since it was read
            receipts = await node.rpc.receipts(block_hash)
        else:
            raw, receipts = await asyncio.gather(node.rpc.header(block_hash), node.rpc.receipts(block_hash))
            header = None if raw is None else verify_header(raw, schedule, block_hash, count=count)
        if header is None or receipts is None:
            raise Unsettled(f"{node.name} does not hold the block")
        logs, reason = proven_logs(header, receipts, count=count)
        if reason is not None:
            raise Unprovable(reason)
        return Proven("receipts_root", None, header, logs)

    async def _differences(
        self, proven: Proven, schedule: Schedule | None
    ) -> tuple[facts.SomeRows, list[facts.Place]] | None:
        """What the store has otherwise than the proven receipts; None where it agrees, or nothing was proven just now."""
        if proven.header is None:
            return None
        task, header, conn = self._task, proven.header, self._task.lease.connection
        emitters = [e.address for e in await chains.load_emitters(conn, task.chain.chain_id)]
        wanted = {"0x" + emitter.hex() for emitter in emitters}
        logs = timed([raw for raw in proven.logs if raw.address.lower() in wanted], schedule, {header.number: header})
        rows = task.decoder.decode(logs, await load_speakers(conn, task.chain.chain_id))
        theirs = stored.as_stored(rows)
        ours = {
            place: reading
            for place, reading in (
                await stored.readings(conn, task.chain.chain_id, emitters, header.number, header.number)
            ).items()
            if place.block_hash == header.hash
        }
        if not ours:  # undone since it was asked, or none of ours
            return None
        differing = {place for place in (*ours, *theirs) if ours.get(place) != theirs.get(place)}
        if not differing:
            return None
        return facts.only(rows, differing), [place for place in differing if place in ours]

    def _tell(self, found: Open, proven: Proven, repaired: bool) -> None:
        task, number = self._task, found.block[1]
        if proven.proof == "cannot_verify" and found.proof is None:
            log.warning("a block cannot be proven", chain=task.chain.name, block=number, reason=proven.reason)
        if repaired:
            log.error(
                "events of a block were not those that its receipts prove: they are put right",
                chain=task.chain.name,
                block=number,
            )
        if task.metrics is not None and found.proof is None and task.chain.proof != "off":
            outcome = "repaired" if repaired else proven.proof or "waiting"
            task.metrics.proofs.labels(task.chain.name, outcome).inc()


class Unprovable(Unsettled):
    """The receipts are the block's as far as anybody can tell, and no root can be made of them."""


def _known(proof: str) -> Proof:
    return "receipts_root" if proof == "receipts_root" else "cannot_verify"
