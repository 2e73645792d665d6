"""`python -m tests.simulation.seeded --seeds 200`: plays seeds, prints those that fail, and how to play one again."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings are walked in the same order in every run
    os.execve(
        sys.executable,
        [sys.executable, "-m", "tests.simulation.seeded", *sys.argv[1:]],
        os.environ | {"PYTHONHASHSEED": "0"},
    )

from tests.simulation.seeded import run  # isort: skip  - replaces the clocks before the product is imported

from tests import fault_table
from tests.movements import watched
from tests.simulation.seeded import alone, mutants
from tests.simulation.seeded.postgres import SimulatedPostgres
from tests.simulation.seeded.world import Verdict, World


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("tests.simulation.seeded", description=__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int, action="append", default=[], help="this one alone; may be repeated")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="the daemons' own log too")
    parser.add_argument("--trace", action="store_true", help="every step of the trace")
    parser.add_argument("--timeout", type=float, default=120.0, help="real seconds after which a seed has failed")
    parser.add_argument(
        "--chaos", type=float, default=1.0, help="so many times more often statements and processes die"
    )
    parser.add_argument(
        "--crash-at", type=int, help="die at this statement of a commit path: even numbers before it, odd ones after"
    )
    parser.add_argument(
        "--crashes", type=int, default=0, help="play each seed so many times, dying one step later each time"
    )
    parser.add_argument("--mutant", default="", help="play with this bug planted")
    parser.add_argument("--mutants", nargs="*", help="plant each (or those named) in turn: some seed must fail")
    parser.add_argument("--tries", type=int, default=12, help="seeds per mutant, after those known to catch it")
    parser.add_argument("--faults", nargs="*", help="strike each alone (or those named): its metric must move")
    parser.add_argument(
        "--quiet", type=float, default=World.quiet, help="virtual seconds in which all must come to rest"
    )
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def _child(seed: int, owner: str, daemon: str, options: argparse.Namespace, pipe: int) -> None:
    """Forked: a fresh copy of a process that has done nothing yet."""
    began = time.process_time()
    asyncio._set_running_loop(None)
    faulthandler.dump_traceback_later(options.timeout, exit=True)
    try:
        if options.mutant:
            mutants.plant(options.mutant)
        World.quiet = options.quiet
        World.chaos, World.crash_at = options.chaos, options.crash_at
        if options.profile:
            import cProfile
            import pstats

            profile = cProfile.Profile()
            verdict = profile.runcall(run.play, seed, owner, daemon, verbose=options.verbose, lines=options.trace)
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        elif options.faults is not None:
            with watched() as seen:
                made = alone.world_of(options.fault, options.beside)
                verdict = run.play(seed, owner, daemon, verbose=options.verbose, lines=options.trace, made=made)
            figures = {figure for choice in fault_table.shown().values() for row in choice for figure in row}
            verdict.moved = {figure: seen.how_far(figure) for figure in figures}
        else:
            verdict = run.play(seed, owner, daemon, verbose=options.verbose, lines=options.trace)
    except BaseException:
        verdict = Verdict(seed, [traceback.format_exc()], "")
    verdict.figures["cpu_seconds"] = round(time.process_time() - began, 2)
    with os.fdopen(pipe, "wb") as out:
        pickle.dump(verdict, out)
    os._exit(0)


async def _one(seed: int, owner: str, daemon: str, options: argparse.Namespace) -> Verdict:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            _child(seed, owner, daemon, options, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as inbox:
        data = await asyncio.to_thread(inbox.read)
    await asyncio.to_thread(os.waitpid, pid, 0)
    await run.drop(pid, owner)
    died = Verdict(seed, ["its process died: see above"], "", figures={"cpu_seconds": 0.0})
    return pickle.loads(data) if data else died


async def _on_a_server(
    migrating: asyncio.Lock, act: Callable[[Callable[[int, argparse.Namespace], Awaitable[Verdict]]], Awaitable[None]]
) -> None:
    """A server of one's own to play on: what others do in a cluster shows in the order of rows."""
    state = Path(tempfile.mkdtemp(prefix="indexer-simulation-"))
    state.chmod(0o711)
    settings = {"shared_buffers": "128MB", "autovacuum": "off", "max_connections": "200", "log_min_messages": "fatal"}
    try:
        async with SimulatedPostgres(state, durable=False, settings=settings) as server:
            owner = server.dsn("indexer_owner", "DB").replace("/DB?", "/{}?")
            daemon = server.dsn("indexer", "DB").replace("/DB?", "/{}?")
            async with migrating:  # Alembic has one context per process
                await run.prepare(owner)
            await act(lambda seed, options: _one(seed, owner, daemon, options))
    finally:
        shutil.rmtree(state, ignore_errors=True)


KEPT = Path(__file__).with_name("regressions.txt")


def kept() -> list[int]:
    """Seeds that failed once: they are played first, whatever is asked for."""
    return [int(line.split()[0]) for line in KEPT.read_text().splitlines() if line[:1].isdigit()]


def keep(verdict: Verdict, options: argparse.Namespace) -> None:
    """A failing seed, with what was wrong, beside those before; who mends it commits the line with the mending."""
    plain = not (options.seed or options.crashes or options.mutant)
    if plain and verdict.seed not in kept():
        with KEPT.open("a") as file:
            file.write(f"{verdict.seed}  {verdict.wrong[0].strip().splitlines()[-1][:150]}\n")


async def _mutants(options: argparse.Namespace) -> int:
    """Whether each planted bug is noticed by some seed that the product as it is passes."""
    names = options.mutants or [each.name for each in mutants.MUTANTS if each.seeds]
    unshown = [each.name for each in mutants.MUTANTS if not each.seeds]
    if unshown and not options.mutants:
        print(f"left out, since no seed is known to notice them: {', '.join(unshown)}", flush=True)
    waiting, survived, began = list(reversed(names)), list[str](), time.monotonic()
    honest: dict[int, asyncio.Task[Verdict]] = {}

    async def hunt(play: Callable[[int, argparse.Namespace], Awaitable[Verdict]]) -> None:
        async def plain(seed: int, asked: argparse.Namespace) -> Verdict:
            return await play(seed, argparse.Namespace(**{**vars(asked), "mutant": ""}))

        while waiting:
            name = waiting.pop()
            mutant = next(each for each in mutants.MUTANTS if each.name == name)
            asked = argparse.Namespace(**{**vars(options), "mutant": name, "quiet": min(options.quiet, 120.0)})
            for seed in dict.fromkeys(
                [*mutant.seeds, *options.seed, *range(options.first, options.first + options.tries)]
            ):
                verdict = await play(seed, asked)
                if not verdict.wrong:
                    continue
                what = verdict.wrong[0].strip().splitlines()[-1]
                if not verdict.trace:  # one that was cut off for its real time proves nothing
                    print(f"{name}: seed {seed} was not played: {what}", flush=True)
                    continue
                if seed not in honest:
                    honest[seed] = asyncio.ensure_future(plain(seed, asked))
                if wrong := (await honest[seed]).wrong:
                    print(f"{name}: seed {seed} proves nothing, it fails without it: {wrong[0]}", flush=True)
                    continue
                print(f"{name}: caught by seed {seed}: {what}", flush=True)
                break
            else:
                survived.append(name)
                print(f"{name}: SURVIVED", flush=True)

    migrating = asyncio.Lock()
    await asyncio.gather(*(_on_a_server(migrating, hunt) for _ in range(min(options.jobs, len(names)))))
    print(f"{len(names)} mutants in {time.monotonic() - began:.0f} s, {len(survived)} survived: {', '.join(survived)}")
    return 1 if survived else 0


async def _faults(options: argparse.Namespace) -> int:
    """Whether each seeded fault, struck alone, moves the metric that docs/faults.md names for it; and the oracle holds."""
    names = [name for name in options.faults or alone.names() if fault_table.shown().get(name)]
    if unknown := set(options.faults) - set(names):
        print(f"docs/faults.md names no metric that these move: {', '.join(sorted(unknown))}")
        return 2
    waiting, unmoved, began = list(reversed(names)), list[str](), time.monotonic()
    undisturbed: dict[tuple[object, int], asyncio.Task[Verdict]] = {}

    async def strike(play: Callable[[int, argparse.Namespace], Awaitable[Verdict]]) -> None:
        while waiting:
            name = waiting.pop()
            said = "never struck"
            for seed in range(options.first, options.first + options.tries):
                struck = await play(seed, argparse.Namespace(**{**vars(options), "fault": name, "beside": ""}))
                if struck.wrong and not struck.trace:  # cut off for its real time: it proves nothing
                    said = f"seed {seed} was not played"
                    continue
                if struck.wrong:
                    said = f"seed {seed} FAILED: {struck.wrong[0].strip().splitlines()[-1]}"
                    break
                if not struck.struck[name]:
                    continue
                key = (alone.kind_of(name), seed)
                if key not in undisturbed:
                    beside = argparse.Namespace(**{**vars(options), "fault": "", "beside": name})
                    undisturbed[key] = asyncio.ensure_future(play(seed, beside))
                measure = await undisturbed[key]
                moved = [
                    max(row, key=lambda figure: struck.moved[figure] - measure.moved[figure])
                    for row in fault_table.shown()[name]
                ]
                said = ", ".join(f"{each} {measure.moved[each]:g} → {struck.moved[each]:g}" for each in moved)
                if all(alone.moved(each, measure.moved[each], struck.moved[each]) for each in moved):
                    print(f"{name:38} seed {seed}: {said}", flush=True)
                    break
            else:
                said = f"UNMOVED in {options.tries} seeds, the last: {said}"
            if "UNMOVED" in said or "FAILED" in said:
                unmoved.append(name)
                print(f"{name:38} {said}", flush=True)

    migrating = asyncio.Lock()
    await asyncio.gather(*(_on_a_server(migrating, strike) for _ in range(min(options.jobs, len(names)))))
    print(f"{len(names)} faults in {time.monotonic() - began:.0f} s, {len(unmoved)} without their metric")
    return 1 if unmoved else 0


async def _all(options: argparse.Namespace) -> int:
    chosen = options.seed or [*kept(), *range(options.first, options.first + options.seeds)]
    seeds = [
        (seed, at) for seed in chosen for at in (range(options.crashes) if options.crashes else [options.crash_at])
    ]
    waiting, failed, began = list(reversed(seeds)), list[Verdict](), time.monotonic()
    struck: Counter[str] = Counter()
    migrating, cpu = asyncio.Lock(), 0.0

    def report(verdict: Verdict, at: int | None) -> None:
        nonlocal cpu
        struck.update(verdict.struck)
        cpu += verdict.figures["cpu_seconds"]
        line = " ".join(f"{key}={value}" for key, value in verdict.figures.items())
        line += f" crash_at={at}" if at is not None else ""
        print(f"seed {verdict.seed}: {'FAILED' if verdict.wrong else 'ok'} {verdict.trace[:12]} {line}", flush=True)
        if verdict.wrong:
            failed.append(verdict)
            keep(verdict, options)
            for what in verdict.wrong[:12]:
                print(f"    {what}")
        if options.trace:
            print("\n".join(verdict.tail))

    async def work(play: Callable[[int, argparse.Namespace], Awaitable[Verdict]]) -> None:
        while waiting:
            seed, at = waiting.pop()
            report(await play(seed, argparse.Namespace(**{**vars(options), "crash_at": at})), at)

    await asyncio.gather(*(_on_a_server(migrating, work) for _ in range(min(options.jobs, len(seeds)))))
    print(f"{len(seeds)} seeds in {time.monotonic() - began:.0f} s ({cpu:.0f} s of Python), {len(failed)} failed")
    print("struck: " + ", ".join(f"{name} {count}" for name, count in sorted(struck.items())))
    for verdict in failed:
        print(f"again: make simulate SEED={verdict.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    given = _parse()
    main = _mutants if given.mutants is not None else _faults if given.faults is not None else _all
    sys.exit(asyncio.run(main(given)))
