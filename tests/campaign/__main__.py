"""Kills workers and the daemon at random, under load, and says whether anything showed.

python -m tests.campaign --worker-kills 1000 --daemon-kills 100
"""

import argparse
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from tests.campaign.campaign import Campaign, Plan, Report, prepare
from tests.campaign.models import BUDGET_BYTES
from tests.campaign.supervisor import ColdSupervisor, WarmSupervisor, short_directory

ROOT = Path(__file__).parents[2]
SUPERVISORS = {"cold": ColdSupervisor, "warm": WarmSupervisor}


def main() -> int:
    """Exit code 0 if nothing showed, 1 if something did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--worker-kills", type=int, default=1000, metavar="N", help="at least (default 1000)")
    add("--daemon-kills", type=int, default=100, metavar="N", help="at least (default 100)")
    add(
        "--restarts",
        choices=SUPERVISORS,
        default="cold",
        help="warm: under a stand-in for systemd that keeps the daemon's descriptors",
    )
    add("--seconds", type=float, default=0, help="go on for so long (default: until all are dead)")
    add("--seed", type=int, default=None, help="of the choices made (default: a new one, said)")
    add("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: nothing is left behind
    # The server that workers are forked from imports what this process imports.
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    plan = Plan(
        worker_kills=arguments.worker_kills,
        daemon_kills=arguments.daemon_kills,
        seconds=arguments.seconds,
        seed=secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed,
    )
    say(f"campaign with --seed {plan.seed}")
    with short_directory() as sockets, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        packs, settings = prepare(directory)
        supervise = SUPERVISORS[arguments.restarts]
        with supervise(Path(sockets) / "s", packs, BUDGET_BYTES, settings) as supervisor:
            report = Campaign(plan, directory, supervisor, say).run()
    print(json.dumps(report.as_json(), indent=1) if arguments.json else described(report))
    return 0 if report.passed else 1


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def described(report: Report) -> str:
    """For people."""
    work = report.work
    lines = [
        f"killed       {report.worker_kills} workers and {report.daemon_kills} daemons in "
        f"{report.seconds:.0f} s; {report.worker_stops} workers stopped for a while",
        f"used         {work.records_used} records ({work.bytes_used / 1e9:.2f} GB), "
        f"{work.hits} hits and {work.misses} misses, {work.reads} by RPC; "
        f"{work.records_wrong} wrong",
        f"lost leases  {work.leases_lost}, none of them used; {work.attaches} times attached",
    ]
    for index, holdings in enumerate(report.rounds, 1):
        lines.append(
            f"round {index}      {holdings.num_files} files, {holdings.num_mappings} shared "
            f"mappings, {holdings.num_threads} threads, heap "
            f"{holdings.anonymous_bytes / 2**20:.1f} MiB, shared "
            f"{holdings.shared_bytes / 2**20:.1f} MiB"
        )
    if report.restart_seconds:
        lines.append(
            f"restart      {statistics.median(report.restart_seconds):.2f} s in the median"
        )
    lines += report.problems
    lines.append("PASSED" if report.passed else f"FAILED (--seed {report.plan.seed})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
