"""What commands print: tables for people on standard output, one JSON document for programs, complaints on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import structlog
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

WIDE = 2000  # columns where nobody looks: a folded id can neither be searched for nor copied
LOG_SECONDS = 10.0  # between log lines of a backfill where there is no terminal

# Numbers as they came, whatever has no JSON of its own as text.
_JSON = msgspec.json.Encoder(enc_hook=str, decimal_format="number")

log = structlog.get_logger(__name__)


def answer(document: Any, as_json: bool, text: Callable[[Any], str | RenderableType]) -> None:
    """Prints the document as JSON, or what `text` makes of it: as wide as it wants to be where no terminal sets a width."""
    if as_json:
        sys.stdout.write(_JSON.encode(document).decode() + "\n")
        return
    made = text(document)
    console = Console(soft_wrap=isinstance(made, str), highlight=False, width=None if sys.stdout.isatty() else WIDE)
    console.print(_shown(made) if isinstance(made, str) else made, crop=False)


def warn(message: str) -> None:
    sys.stderr.write(f"warning: {_shown(message)}\n")


def complain(message: str, detail: Any = None) -> None:
    sys.stderr.write(f"indexer: {_shown(message)}\n")
    if detail:
        sys.stderr.write(json.dumps(detail, ensure_ascii=False) + "\n")


def _shown(words: str) -> Text:
    """Other people's words as they stand: references, programmes' names and partners' texts are a stranger's, so no bracket in
    them is markup, and no control character reaches the terminal.
    """
    return Text(
        "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in words)
    )


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(_shown, cells))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "id")
    return table


def operations_text(page: dict[str, Any]) -> RenderableType:
    table = _table("id", "brand", "reference", "status", "generation", "registered")
    for row in page["data"]:
        _add(
            table, row["id"], row["brand"], row["reference"], row["status"], str(row["generation"]), row["registeredAt"]
        )
    if page.get("nextCursor"):
        return Group(table, Text(f"more: --cursor {page['nextCursor']}", no_wrap=True, overflow="ignore"))
    return table


def operation_text(row: dict[str, Any]) -> str:
    lines = [
        f"{row['reference']}  {row['status']}, generation {row['generation']}",
        f"  id          {row['id']}",
        f"  brand       {row['brand']}",
        f"  registered  {row['registeredAt']}",
    ]
    for number, leg in enumerate(row["legs"]):
        lines.append(
            f"  leg {number}       {leg['kind']} {leg['amount']} of {leg.get('loyaltyId', '')} for {leg.get('holder', leg.get('walletId', ''))}"
        )
    for evidence in row["evidence"]:
        lines.append(
            f"  evidence    {evidence['evidenceId']}  leg {evidence['leg']}, {evidence['basis']}, {evidence['confidence']}, "
            f"block {evidence['blockNumber']}, tx {evidence['txHash']}"
        )
    for conflict in row["conflicts"]:
        terms = "; ".join(f"{d['term']}: expected {d['expected']}, found {d['found']}" for d in conflict["differences"])
        lines.append(
            f"  conflict    {conflict['evidenceId']}  leg {conflict['leg']}: {terms or 'several legs fit, or it came too late'}"
        )
    for waiting in row["waitingFor"]:
        why = f": {waiting['reason']}" if waiting.get("reason") else ""
        lines.append(f"  waits for   {waiting['for']} of leg {waiting['leg']} ({waiting['confidence']}){why}")
    for step in row.get("history") or []:
        lines.append(f"  {step['at']}  {step['from'] or '(registered)'} -> {step['to']}  {step['cause']}")
    for receipt in row.get("receipts") or []:
        lines.append(
            f"  receipt     generation {receipt['generation']}: {receipt['outcome']} at {receipt['recordedAt']}"
        )
    return "\n".join(lines)


def tokens_text(document: dict[str, Any]) -> Table:
    table = _table("id", "name", "brand", "scopes", "created", "revoked")
    for row in document["data"]:
        _add(
            table,
            row["id"],
            row["name"],
            row["brand"] or "every",
            " ".join(row["scopes"]),
            row["createdAt"],
            row["revokedAt"] or "",
        )
    return table


def webhooks_text(document: dict[str, Any]) -> str:
    lines = []
    for row in document["data"]:
        waiting = f"{row['waiting']} waiting" + (f" since {row['oldestWaiting']}" if row["oldestWaiting"] else "")
        lines.append(f"{row['brand']}/{row['name']}  {row['state']}, {waiting}, {row['deadLetters']} dead letters")
        if row["reason"]:
            lines.append(f"  since {row['since']}: {row['reason']}")
        elif row["failingSince"]:
            lines.append(f"  all of {row['failures']} attempts since {row['failingSince']} have failed")
    return "\n".join(lines) or "no webhooks"


def signals_text(document: dict[str, Any]) -> str:
    lines = []
    for row in document["data"]:
        number = "without a number yet" if row["sequence"] is None else f"number {row['sequence']}"
        lines.append(f"{row['id']}  {row['type']}, {number} of {row['brand']}, {row['createdAt']}")
        if row["operationId"]:
            lines.append(f"  operation {row['operationId']}, generation {row['generation']}")
        lines += [f"  {_delivery_text(delivery)}" for delivery in row["deliveries"]]
    if document["more"]:
        lines.append("there are more: --limit")
    return "\n".join(lines) or "no such signals"


def _delivery_text(row: dict[str, Any]) -> str:
    reason = f": {row['error']}" if row["error"] and row["state"] != "delivered" else ""
    if row["awaits"]:
        word, _, chain = row["awaits"].partition(":")
        waits = f"the latch of chain {chain} is resolved" if word == "latch" else f"chain {chain} is followed again"
        reason = f": set aside until {waits}"
    return f"{row['webhook']} {row['state']}, {row['attempts']} attempts{reason}"


def signal_text(row: dict[str, Any]) -> str:
    lines = [
        f"{row['type']} {row['id']}",
        f"  brand       {row['brand']}, sequence {row['sequence'] or '(not numbered yet)'}, generation {row['generation']}",
        f"  operation   {row['operationId'] or 'none'}",
        f"  made        {row['createdAt']}",
    ]
    for word in ("supersedes", "supersededBy"):
        if row[word]:
            lines.append(f"  {word:<12}{row[word]}")
    for delivery in row["deliveries"]:
        later = f", next attempt {delivery['nextAt']}" if delivery["nextAt"] else ""
        lines.append(f"  {_delivery_text(delivery)}{later}")
        for made in row["attempts"]:
            if made["webhook"] == delivery["webhook"]:
                outcome = made["error"] or f"HTTP {made['status']}"
                answer = f"; {made['answer']}" if made["answer"] else ""
                lines.append(f"    {made['number']:>3}  {made['begunAt']}  {made['seconds']:.3f} s  {outcome}{answer}")
    return "\n".join(lines)


def sql_users_text(document: dict[str, Any]) -> Table:
    table = _table("name", "brand", "created")
    for row in document["data"]:
        _add(table, row["name"], row["brand"] or "every, to read", row["createdAt"] or "")
    return table


def balances_text(document: dict[str, Any]) -> Table:
    table = _table("chain", "programme", "issuer", "expires", "balance", "source", "history")
    for row in document["data"]:
        _add(
            table,
            row["chainId"],
            f"{row['name']} ({row['symbol']})",
            row["issuer"],
            "never" if row["expiresAt"] == "0" else row["expiresAt"],
            row["balance"],
            row["source"],
            "complete" if row["historyComplete"] else "incomplete",
        )
    for row in document["partners"]:
        shown = row["balance"] if row["balance"] is not None else f"unknown: {row['problem']}"
        _add(table, row["partner"], row["token"] or "", row["brand"], "", shown, row["source"], row["problem"] or "")
    return table


def latch_text(latch: dict[str, Any]) -> str:
    """Both sides of a finality violation, and the endpoints that show each."""
    lines = []
    for words, side in (("we hold", latch["ours"]), ("the other", latch["theirs"])):
        shown = ", ".join(side.get("endpoints") or []) or "no endpoint that was asked"
        lines.append(f"  {words:<10}block {side['number']} {side['hash']}, shown by {shown}")
    return "\n".join([*lines, f"  since     {latch['at']}"])


def _witnesses(seen: dict[str, Any]) -> list[str]:
    """Several endpoints: whether enough agree, and whoever does not."""
    if not seen["endpoints"]:
        return []
    words = f"agree up to block {seen['blockNumber']}" if seen["agree"] else "DO NOT AGREE: facts go on, signals wait"
    lines = [f"  witnesses {seen['needed']} needed; endpoints {words}"]
    for each in seen["endpoints"]:
        since = f" since {each['since']}" if each["since"] and each["state"] != "live" else ""
        told = each["state"] + since + (f": {each['reason']}" if each["reason"] else "")
        lines.append(f"    {each['name']} ({each['role']}{', leads' if each['leads'] else ''}) {told}")
    return lines


def status_text(seen: dict[str, Any]) -> str:
    lines = [f"schema {seen['schema']}, PostgreSQL {seen['postgresql']}, stream {seen['stream']}"]
    for chain in seen["chains"]:
        live = "" if chain["live"] else "; NOT LIVE: signals of readiness wait"
        lines.append(f"chain {chain['name']} ({chain['chainId']}), {chain['mode'] or 'not followed yet'}{live}")
        for level in ("head", "safe", "finalized"):
            head = chain[level]
            if head:
                lag = "" if head["lagSeconds"] is None else f", {head['lagSeconds']:.1f} s behind"
                lines.append(f"  {level:<10}{head['number']}{lag}")
        lines += _witnesses(chain["witnesses"])
        history = chain["history"]
        ratio = "" if history["ratio"] is None else f" ({history['ratio']:.1%})"
        lines.append(
            f"  history   {'complete' if history['complete'] else 'incomplete'}{ratio}, {history['emitters']} emitters"
        )
        if chain["latch"] is not None and bytes(chain["latch"]) != b"null":
            sides = latch_text(json.loads(bytes(chain["latch"])))
            lines.append(f"  FINALITY VIOLATION: no signals for this chain.\n{sides}")
    for unsent in seen["unsent"]:
        lines.append(f"brand {unsent['brand']}: oldest unsent signal {unsent['seconds']:.0f} s old")
    for hook in seen["webhooks"]:
        if hook["state"] != "active":
            lines.append(
                f"webhook {hook['brand']}/{hook['name']} is {hook['state'].upper()}: {hook['reason'] or 'not configured'}; {hook['waiting']} wait"
            )
        elif hook["deadLetters"]:
            lines.append(f"webhook {hook['brand']}/{hook['name']}: {hook['deadLetters']} dead letters")
    for account in seen["partners"]:
        name = f"{account['partner']} account of {account['brand']}"
        if account["refused"] is not None:
            said = account["refused"].removeprefix(f"{name}, ")
            lines.append(f"{name}: REFUSED since {account['refusedSince']}: {said}")
        elif account["problem"] is not None:
            said = account["problem"].removeprefix(f"{name}, ")
            lines.append(f"{name}: {said} (it answered well last at {account['answeredAt'] or 'no time'})")
        if account["differences"]:
            last = account["differences"][-1]
            lines.append(f"{name} DIFFERS from the chain, last seen {last['at']}: {last['what']}")
    for lease in seen["leases"]:
        lines.append(
            f"task {lease['task']:<18}{'held by ' + str(lease['holder']) if lease['held'] else 'free'} (epoch {lease['epoch']})"
        )
    return "\n".join(lines)


class BackfillProgress:
    """Blocks of history done, with rate and time left: a bar on a terminal, a log line now and then elsewhere."""

    def __init__(self, bars: Progress | None, what: str = "history") -> None:
        self._bars, self._what = bars, what
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}

    def __call__(self, chain: str, done: int, total: int, events: int) -> None:
        """Of a chain: blocks covered and to cover in this run, and events found."""
        now = time.monotonic()
        begun, first = self._begun.setdefault(chain, (now, done))
        rate = (done - first) / (now - begun) if done > first and now > begun else None
        if self._bars is not None:
            if chain not in self._tasks:
                self._tasks[chain] = self._bars.add_task(chain, total=total, rate="", events=0)
            self._bars.update(
                self._tasks[chain],
                completed=done,
                total=total,
                rate="" if rate is None else f"{rate:,.0f} blocks/s",
                events=events,
            )
            if done >= total:
                self._bars.remove_task(self._tasks.pop(chain))
                self._begun.pop(chain)
        elif done >= total or now - self._told.get(chain, 0.0) >= LOG_SECONDS:
            self._told[chain] = now
            left = None if rate is None else round((total - done) / rate)
            log.info(
                self._what,
                chain=chain,
                blocks=done,
                of=total,
                events=events,
                blocks_per_second=None if rate is None else round(rate),
                seconds_left=left,
            )
            if done >= total:
                self._begun.pop(chain)


@contextmanager
def backfill_progress(what: str = "history") -> Iterator[BackfillProgress]:
    """A progress bar where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield BackfillProgress(None, what)
        return
    bars = Progress(
        TextColumn(f"{what} of {{task.description}}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[events]} events  {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        yield BackfillProgress(bars, what)
