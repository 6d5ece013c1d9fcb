"""``expertd replay``."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from expertstore.errors import InvalidInputError
from expertstore.interrupts import interruptible

if TYPE_CHECKING:
    from expertd.residency import Policy
    from expertd.traces.replay import Trace

_OPTIMUM = "optimum"
_MAX_WORKERS = 1024


class _Result(NamedTuple):
    """One line of the table; the fields are those of the JSON."""

    policy: str
    share: float
    decode_hit_rate: float | None
    lifetime_hit_rate: float
    default: bool


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(replay)


def replay(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE.csv", readable=False, help="A routing trace.")
    ],
    share: Annotated[
        str, typer.Option(metavar="SHARE,...", help="How much of all experts RAM holds.")
    ] = "0.10,0.25,0.5",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A policy of expertd, or FILE.py:CLASS; all of expertd's if none is given.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Play it by N workers at once, each elsewhere in it.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Tells what hit rates a budget gives: replays which experts a real run used.

    Runs the daemon's own policies over the trace, from an empty store, beside the offline
    optimum, which knows the future. Decode is the steady state; lifetime has the prompts too,
    and the misses of an empty store. Record a trace with `expertd record`; docs/residency.md has
    its format, and how to try a policy of your own.

    Example: `expertd replay TRACE.csv --share 0.10,0.25 --policy lru --policy density`
    """
    # numpy: not for --help
    from expertd.cli.progress import ProgressDisplay
    from expertd.residency import POLICIES
    from expertd.traces.replay import read_trace

    shares = _shares(share)
    policies = [_policy(name) for name in dict.fromkeys(policy or POLICIES)]
    if not 1 <= workers <= _MAX_WORKERS:
        raise InvalidInputError(f"--workers is {workers}; give 1 to {_MAX_WORKERS}.")
    with interruptible(), ProgressDisplay("reading") as display:
        played = read_trace(trace, lambda done, size: display.update(done, size, ""))
    _check_slots(trace, played, shares)
    if played.num_lost:
        _note(f"{trace} says that {played.num_lost} accesses are missing in it.")
    if workers > 1:
        played = played.played_by(workers)
    needed = played.model.touches_per_token
    if min(shares) * played.model.num_entries < needed:
        _note(
            f"one token uses {needed} of {played.model.num_entries} experts, a share of "
            f"{needed / played.model.num_entries:.3f}: below that the daemon refuses to serve, "
            "and plain LRU, which evicts what the next layers need, falls towards no hits at all."
        )
    results = list(_run(played, shares, policies))
    if as_json:
        typer.echo(json.dumps({"results": [result._asdict() for result in results]}, indent=1))
    else:
        _print(results)


def _run(
    trace: "Trace", shares: Sequence[float], policies: "Sequence[tuple[str, type[Policy]]]"
) -> Iterator[_Result]:
    from expertd.cli.progress import ProgressDisplay
    from expertd.residency import DEFAULT_POLICY
    from expertd.traces.replay import replay as replay_policy
    from expertd.traces.replay import replay_optimum

    model = trace.model
    num_rows, done = trace.num_rows * len(shares) * (len(policies) + 1), 0
    with interruptible(), ProgressDisplay("replaying") as display:

        def tick(rows: int) -> None:
            nonlocal done
            done += rows
            display.update_count(done, num_rows, "rows")

        for share in shares:
            num_slots = int(share * model.num_entries + 1e-9)
            for name, kind in policies:
                policy = kind(model.num_experts, model.experts_per_token)
                rates = replay_policy(trace, policy, num_slots, tick)
                yield _Result(name, share, rates.decode, rates.lifetime, name == DEFAULT_POLICY)
            rates = replay_optimum(trace, num_slots, tick)
            yield _Result(_OPTIMUM, share, rates.decode, rates.lifetime, False)


def _shares(text: str) -> list[float]:
    shares = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            raise InvalidInputError(
                f"--share: {part.strip()!r} is no number; give shares like 0.10,0.25."
            ) from None
        if not 0 < share <= 1:
            raise InvalidInputError(f"--share: {part.strip()} is not above 0 and at most 1.")
        shares.append(share)
    return list(dict.fromkeys(shares))


def _check_slots(path: Path, trace: "Trace", shares: Sequence[float]) -> None:
    if int(min(shares) * trace.model.num_entries + 1e-9) < 1:
        raise InvalidInputError(
            f"--share: {min(shares):g} of the {trace.model.num_entries} experts of {path} is less "
            "than one."
        )


def _policy(name: str) -> "tuple[str, type[Policy]]":
    """The class of that name, and its name in the table."""
    from expertd.residency import POLICIES

    if name in POLICIES:
        return name, POLICIES[name]
    path, colon, attribute = name.rpartition(":")
    if not colon:
        known = ", ".join(POLICIES)
        raise InvalidInputError(
            f"there is no policy {name!r}; known are {known}, and your own as FILE.py:CLASS."
        )
    kind = _load(Path(path), attribute)
    return str(getattr(kind, "name", attribute)), kind


def _load(path: Path, attribute: str) -> "type[Policy]":
    from expertd.residency import Policy

    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InvalidInputError(f"{path} is no Python file to take a policy from.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: Any = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        raise InvalidInputError(
            f"{path} has no class {attribute!r} derived from expertd.residency.Policy."
        )
    return kind


def _print(results: Sequence[_Result]) -> None:
    width = max(len("policy"), *(len(result.policy) for result in results)) + 2
    typer.echo(f"{'share':>6}  {'policy':{width}}{'decode':>8}{'lifetime':>10}")
    for _, group in groupby(results, lambda result: result.share):
        typer.echo()
        for result in group:
            decode = "-" if result.decode_hit_rate is None else f"{result.decode_hit_rate:.3f}"
            default = "  default" if result.default else ""
            typer.echo(
                f"{result.share:>6.3g}  {result.policy:{width}}{decode:>8}"
                f"{result.lifetime_hit_rate:>10.3f}{default}"
            )


def _note(sentence: str) -> None:
    typer.echo(f"note: {sentence}", err=True)
