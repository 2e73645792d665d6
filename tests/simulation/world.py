"""The daemon's loops in one process: following, history, second looks, settling, numbering and
delivering, over a fake node and a real PostgreSQL.

They are started as the daemon starts them (its configuration, supervisor and leases), less HTTP and signals of the operating
system: so a test can stop everything anywhere, begin again on the same database, and see what a brand would see.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from indexer import daemon
from indexer.chain.runtime import ChainRuntime
from indexer.config import Chain, Config
from indexer.observation import SettlementObserver
from indexer.settlement import loop as settlement
from indexer.settlement.rules import rules_of
from indexer.signals import sequencer
from indexer.signals.webhooks import Dispatcher, endpoints_of
from indexer.store.database import Database
from indexer.store.leases import Leases
from indexer.store.wakeups import Wakeups
from indexer.supervision import Body, Supervisor
from indexer.telemetry import Metrics
from tests.fake_node import FakeNode
from tests.following import FACTORY, ISSUER, caught_up, chain_config, eventually, loyalty_id, stored, truth

BRAND = "bloom"
HOLDER = b"\x40" * 20  # of `issued`
SECRET = "whsec_" + base64.b64encode(b"a secret of the simulation's").decode()
SOON = (0.1,) * 12  # the schedule of three days of attempts, compressed


def word(number: int) -> str:
    return "0x" + number.to_bytes(32, "big").hex()


def leg_of(nonce: int, /, *, n: int = 1, amount: int = 10, factory: bytes = FACTORY, **given: Any) -> dict[str, Any]:
    """The leg that `issued(nonce, n, amount, factory)` settles."""
    return {
        "kind": "loyfin.issuance",
        "chainId": "84532",
        "factory": "0x" + factory.hex(),
        "issuer": "0x" + ISSUER.hex(),
        "holder": "0x" + HOLDER.hex(),
        "loyaltyId": "0x" + loyalty_id(n).hex(),
        "amount": str(amount),
        "nonce": word(nonce),
        "operationHash": "0x" + hashlib.sha256(b"op%d" % nonce).hexdigest(),
    } | given


class World:
    """One brand, one chain, one database. `settings` are keys of the chain's configuration."""

    def __init__(
        self,
        database: Database,
        node: FakeNode,
        *,
        confidence: str = "safe",
        seconds: float | None = None,
        chain: Callable[..., Chain] = chain_config,
        **settings: Any,
    ) -> None:
        self.database, self.node = database, node
        self.policy: Mapping[str, Any] = {"confidence": confidence} | ({} if seconds is None else {"seconds": seconds})
        self.settings: Mapping[str, Any] = {"second_look_seconds": 0.1, "verify_calls_per_second": 1000.0} | settings
        self.metrics = Metrics()
        self.wakeups = Wakeups()
        self.supervisor: Supervisor | None = None
        self._chain = chain

    @asynccontextmanager
    async def running(
        self,
        *,
        unmatched_quiet_ms: int = 600_000,
        lease_seconds: float = 15.0,
        webhooks: Sequence[Mapping[str, Any]] = (),
        **settings: Any,
    ) -> AsyncIterator[None]:
        """All loops, for the body; then every one is stopped where it stands, as at the end of a process."""
        chain = self._chain(self.node, **{**self.settings, **settings})
        brand: dict[str, Any] = {
            "name": BRAND,
            "issuers": ["0x" + ISSUER.hex()],
            "policies": [dict(self.policy)],
        }
        brand["unmatched_since"] = "2020-01-01T00:00:00Z"
        brand["webhooks"] = [{"secrets": [SECRET], "allow": ["127.0.0.0/8"]} | dict(webhook) for webhook in webhooks]
        config = Config.model_validate({"state_dir": "/nonexistent", "chains": [chain], "brands": [brand]})
        rng = random.Random(1)
        wakeups = self.wakeups = Wakeups()
        await daemon.apply_configuration(self.database, config)
        async with ChainRuntime.open(chain, self.metrics, wakeups, rng) as runtime:
            observer = SettlementObserver(self.metrics, {chain.chain_id: chain.name})
            rules = rules_of(config.brands)
            dispatcher = Dispatcher(
                endpoints_of(config.brands), metrics=self.metrics, schedule=SOON, rng=rng, sweep=0.1
            )
            supervisor = self.supervisor = Supervisor(
                Leases(self.database, ttl=lease_seconds, rng=rng), self.metrics, rng
            )
            bodies: dict[str, Body] = {
                "settle": lambda lease: settlement.settle(
                    lease, wakeups, rules, {}, observer, unmatched_quiet_ms=unmatched_quiet_ms
                ),
                "number": lambda lease: sequencer.number(lease, wakeups, self.metrics, sweep=0.1),
                "deliver": lambda lease: dispatcher.run(lease, wakeups),
                "follow": runtime.follow,
                "history": runtime.fill_history,
                "verify": runtime.attest,
            }
            tasks = [asyncio.create_task(supervisor.keep(name, body), name=name) for name, body in bodies.items()]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await dispatcher.close()

    # ------------------------------------------------------------------ the brand's side

    async def register(
        self, nonce: int, /, *, reference: str | None = None, requested_at: str | None = None, **leg: Any
    ) -> str:
        """Registers what `issued(nonce, …)` settles; the reference."""
        reference = reference or f"op-{nonce}"
        request = {"brand": BRAND, "reference": reference, "legs": [leg_of(nonce, **leg)]}
        if requested_at is not None:
            request["requestedAt"] = requested_at
        await self.database.pool.fetchval("SELECT loyalty.register_operation($1)", request)
        self.wakeups.poke("registered")
        return reference

    async def state(self, reference: str) -> str:
        return str(
            await self.database.pool.fetchval("SELECT status FROM loyalty.operations WHERE reference = $1", reference)
        )

    async def trace(self, reference: str) -> list[str]:
        """The types of the operation's signals in their order, hints left out."""
        rows = await self.database.pool.fetch(
            "SELECT x.type FROM indexer.outbox x JOIN indexer.operation o ON o.id = x.aggregateid WHERE o.reference = $1 ORDER BY x.position",
            reference,
        )
        types = [row["type"].removeprefix("operation.") for row in rows]
        return [each for each in types if each not in ("confirming", "submitted", "rejected")]

    # ------------------------------------------------------------------ waiting

    async def reaches(self, reference: str, state: str, seconds: float = 60.0) -> None:
        """Waits for the state. Looks are asked for meanwhile: the clock's alarm comes only every three seconds."""

        async def there() -> bool:
            if await self.state(reference) == state:
                return True
            await self.touch()
            await asyncio.sleep(0.1)
            return False

        try:
            await eventually(there, seconds)
        except TimeoutError:
            told = await self.trace(reference)
            raise AssertionError(f"{reference} is {await self.state(reference)}, not {state}; told: {told}") from None

    async def touch(self) -> None:
        await self.database.pool.execute(
            "INSERT INTO indexer.touched_operation (operation_id) SELECT id FROM indexer.operation"
        )
        self.wakeups.poke("registered")

    async def looked(self) -> None:
        """Waits until the reconciler has looked at every operation, at the facts and heads that there are now."""
        await self.touch()

        async def done() -> bool:
            left = await self.database.pool.fetchval(
                "SELECT (SELECT count(*) FROM indexer.touched_operation) + (SELECT count(*) FROM indexer.touched_blocks)"
            )
            return not left

        await eventually(done, what="the reconciler")

    async def caught_up(self) -> None:
        await caught_up(self.database, self.node)

    async def tags(self, *, safe: int, finalized: int) -> None:
        """Moves the node's tags and waits until they are ours. The loops must have come as far."""
        self.node.set_tags(safe=safe, finalized=finalized)

        async def ours() -> bool:
            row = await self.database.pool.fetchrow("SELECT safe_number, finalized_number FROM indexer.chain")
            return row is not None and tuple(row) == (safe, finalized)

        await eventually(ours, what="the tags")

    async def finalized_second(self) -> int:
        """The second of our finalized block."""
        return int(await self.database.pool.fetchval("SELECT finalized_time_ms FROM indexer.chain")) // 1000

    async def verdicts(self, low: int, high: int, emitter: bytes = b"") -> set[str]:
        """Verdicts on blocks low … high: of the head lane, or of one emitter's own coverage."""
        rows = await self.database.pool.fetch(
            "SELECT verdict FROM indexer.coverage WHERE emitter = $3 AND blocks && int8range($1, $2, '[]')",
            low,
            high,
            emitter,
        )
        return {row["verdict"] for row in rows}

    async def problem(self, task: str, *words: str) -> str:
        """Waits until the status shows the task as failed, in these words; the text."""

        async def failed() -> bool:
            assert self.supervisor is not None
            state = self.supervisor.tasks.get(task)
            return state is not None and state.problem is not None

        await eventually(failed, what=task)
        assert self.supervisor is not None
        said = self.supervisor.tasks[task].problem or ""
        assert all(each in said for each in words), said
        return said

    # ------------------------------------------------------------------ what must hold at the end

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 where it was never touched."""
        return self.metrics.registry.get_sample_value(f"loyalty_{name}", labels) or 0.0

    def total(self, name: str, **labels: str) -> float:
        """The sum over all label sets that agree with `labels`."""
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"loyalty_{name}" and labels.items() <= sample.labels.items()
        )

    async def intact(self, factories: tuple[bytes, ...] = (FACTORY,)) -> None:
        """Nothing lost, nothing twice: the facts are the chain's, and each brand's stream has no gap."""

        async def complete() -> bool:
            return await stored(self.database) == truth(self.node.chain, factories)

        try:
            await eventually(complete)
        except TimeoutError:
            ours, theirs = await stored(self.database), truth(self.node.chain, factories)
            raise AssertionError(f"missing {sorted(theirs - ours)}, too many {sorted(ours - theirs)}") from None
        for table in ("programme", "movement", "transfer", "programme_event", "raw_log"):
            twice = await self.database.pool.fetch(
                f"SELECT block_number, log_index FROM indexer.{table} WHERE canonical AND {'item = 0' if table == 'transfer' else 'true'} "
                "GROUP BY 1, 2 HAVING count(*) > 1"
            )
            assert not twice, f"{table}: {twice}"

        async def numbered() -> bool:
            return not await self.database.pool.fetchval("SELECT count(*) FROM indexer.outbox WHERE sequence IS NULL")

        await eventually(numbered, what="numbering")
        rows = await self.database.pool.fetch("SELECT sequence FROM indexer.outbox ORDER BY sequence")
        assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))

    async def evidence(self, reference: str) -> list[dict[str, Any]]:
        found = await self.database.pool.fetchval(
            "SELECT evidence FROM loyalty.operations WHERE reference = $1", reference
        )
        return list(found)

    async def unmatched(self) -> list[UUID]:
        rows = await self.database.pool.fetch(
            "SELECT aggregateid FROM indexer.outbox WHERE type = 'settlement.unmatched'"
        )
        return [row["aggregateid"] for row in rows]
