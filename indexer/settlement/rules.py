"""What the configuration says about settling: policies, how legs are paired by wallet and amount, and how final a partner's word is.

Values only, in the model's terms; the file and its keys are `indexer/config`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from indexer.config import Brand
from indexer.model.confidence import Heads, Level, Policy
from indexer.model.evidence import KEYBAN, QIIBEE, PartnerTransfer
from indexer.model.matching import WalletRules
from indexer.model.standing import Attestation, Block, PartnerRules, Standing
from indexer.model.types import hex0x


@dataclass(frozen=True)
class BrandRules:
    """What the configuration says about settling a brand's operations."""

    policies: tuple[Policy, ...] = ()
    wallet: WalletRules = field(default_factory=WalletRules)
    partners: Mapping[str, PartnerAccount] = field(default_factory=dict)


@dataclass(frozen=True)
class PartnerAccount:
    """What the configuration says about a brand's account at one partner."""

    wallet: WalletRules = field(default_factory=WalletRules)
    rules: PartnerRules = field(default_factory=PartnerRules)
    contract: str | None = None  # the points token on a chain that we follow, lower-case 0x


NO_RULES = BrandRules()


def standing_of(
    heads: Mapping[int, Heads],
    rules: Mapping[str, BrandRules],
    now_ms: int,
    attested: Mapping[Block, Attestation] | None = None,
) -> Standing:
    """Everything that the rungs of evidence depend on."""
    partners = {
        (brand, partner): account.rules for brand, rule in rules.items() for partner, account in rule.partners.items()
    }
    return Standing(heads, partners, now_ms, attested or {})


def with_contracts(transfers: Iterable[PartnerTransfer], rules: Mapping[str, BrandRules]) -> list[PartnerTransfer]:
    """The records beside the token that our own look at them must find moved; without one that look proves nothing."""
    return [
        transfer
        if transfer.chain_id is None
        else replace(transfer, contract=_account(rules, transfer.brand, transfer.partner).contract)
        for transfer in transfers
    ]


def _account(rules: Mapping[str, BrandRules], brand: str, partner: str) -> PartnerAccount:
    return rules.get(brand, NO_RULES).partners.get(partner, PartnerAccount())


def rules_of(brands: Sequence[Brand]) -> dict[str, BrandRules]:
    """The settling rules of a configuration."""
    return {
        brand.name: BrandRules(
            policies=tuple(
                Policy(
                    level=Level[policy.confidence.upper()],
                    seconds=policy.seconds or 0.0,
                    max_amount=policy.max_amount,
                    kind=policy.kind,
                    issuer=policy.issuer,
                    loyalty_id=policy.loyalty_id,
                    bases=frozenset(policy.bases) if policy.bases else None,
                )
                for policy in brand.policies
            ),
            wallet=WalletRules(
                skew_ms=int(brand.match_skew * 1000),
                window_ms=int(brand.match_window * 1000),
                hold=brand.ambiguous == "hold",
            ),
            partners=_partners_of(brand),
        )
        for brand in brands
    }


def _partners_of(brand: Brand) -> dict[str, PartnerAccount]:
    hold = brand.ambiguous == "hold"
    accounts: dict[str, PartnerAccount] = {}
    if brand.keyban is not None:
        keyban = brand.keyban
        accounts[KEYBAN] = PartnerAccount(
            WalletRules(int(keyban.skew * 1000), int(keyban.window * 1000), hold),
            PartnerRules(
                require_success=keyban.require_success,
                finalized_after_ms=None if keyban.finalized_after is None else int(keyban.finalized_after * 1000),
            ),
            None if keyban.token is None else hex0x(keyban.token),
        )
    if brand.qiibee is not None:
        accounts[QIIBEE] = PartnerAccount(
            WalletRules(int(brand.match_skew * 1000), int(brand.match_window * 1000), hold),
            PartnerRules(settle_after_ms=int(brand.qiibee.settle_after * 1000)),
        )
    return accounts
