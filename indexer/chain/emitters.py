"""Who may speak on a chain: the emitters that the configuration names, and the speakers as the store has them."""

from __future__ import annotations

import asyncpg

from indexer.chain.decode import Speakers
from indexer.config import Chain
from indexer.store import chains
from indexer.store.chains import Emitter


def configured_emitters(chain: Chain) -> list[Emitter]:
    """Factories and hubs as the configuration names them: one for each factory that an address may speak for."""
    emitters = [Emitter(f.address, "factory", f.address, f.start_block) for f in chain.factories]
    for factory in chain.factories:
        if factory.event_hub is not None and factory.event_hub != factory.address:
            emitters.append(Emitter(factory.event_hub, "hub", factory.address, factory.start_block))
    return emitters


async def load_speakers(conn: asyncpg.Connection, chain_id: int, upto: int | None = None) -> Speakers:
    """Who may speak, as the store has it, and not the configuration of this process: a replica that was started with another
    one must not drop what is then counted as read. `upto`: programmes announced up to that block alone.
    """
    configured = await chains.load_speakers(conn, chain_id)
    programmes = await chains.load_programmes(conn, chain_id, upto)
    return Speakers(
        chain_id,
        [address for address, factories in configured.items() if address in factories],
        {address: others for address, factories in configured.items() if (others := factories - {address})},
        {p.token: (p.factory, p.issuer, p.loyalty_id) for p in programmes},
    )
