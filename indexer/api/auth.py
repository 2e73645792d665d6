"""Who asks: the bearer token of a request, and whether its scopes and brand allow what is asked.

A token bound to a brand acts for that brand alone; what belongs to another does not exist for it (404), and what it asks
in another's name is refused (403).
"""

from __future__ import annotations

from aiohttp import web

from indexer.api.problems import BAD_REQUEST, FORBIDDEN, UNAUTHORIZED, Problem
from indexer.store.tokens import Authenticator, Token

AUTHENTICATOR: web.AppKey[Authenticator] = web.AppKey("authenticator", Authenticator)
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="indexer"'}
_INVALID = {"WWW-Authenticate": 'Bearer realm="indexer", error="invalid_token"'}


async def authenticated(request: web.Request, scope: str) -> Token:
    """The token of the request, which must have `scope`. Raises Problem 401, 403."""
    header = request.headers.getall("Authorization", [])
    if len(header) != 1:
        detail = (
            "two Authorization headers" if header else "send Authorization: Bearer with a token of `indexer tokens`"
        )
        raise Problem(UNAUTHORIZED, detail, headers=_CHALLENGE)
    scheme, _, credentials = header[0].partition(" ")
    if scheme.lower() != "bearer":
        raise Problem(UNAUTHORIZED, "send Authorization: Bearer with a token of `indexer tokens`", headers=_CHALLENGE)
    token = await request.app[AUTHENTICATOR].authenticate(credentials.strip())
    if token is None:
        raise Problem(UNAUTHORIZED, "the token is unknown or revoked", headers=_INVALID)
    if scope not in token.scopes:
        raise Problem(FORBIDDEN, f"the token lacks the scope {scope}", extra={"scope": scope})
    return token


def may_act_for(token: Token, brand: object) -> None:
    """Refuses a brand that is not the token's. Raises Problem 403."""
    if token.brand is not None and isinstance(brand, str) and brand != token.brand:
        raise Problem(FORBIDDEN, f"the token belongs to brand {token.brand}", extra={"field": "brand"})


def brand_asked(token: Token, stated: str | None) -> str | None:
    """The one brand that is asked about; None for all of them, where the token may. Raises Problem 403."""
    may_act_for(token, stated)
    return token.brand or stated


def one_brand(token: Token, stated: str | None) -> str:
    """The same, where there is no asking about all. Raises Problem 400, 403."""
    brand = brand_asked(token, stated)
    if brand is None:
        raise Problem(
            BAD_REQUEST, "brand: a token of all brands must say which it asks about", extra={"field": "brand"}
        )
    return brand
