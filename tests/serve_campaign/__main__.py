"""Kills engines, daemons and servers under streaming clients, and says whether anything showed.

python -m tests.serve_campaign --engine-kills 100 --daemon-kills 20
"""

import argparse
import asyncio
import json
import secrets
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from expertd.cli.progress import ProgressDisplay
from tests.campaign.supervisor import ColdSupervisor, WarmSupervisor, short_directory
from tests.serve_campaign.asking import MODEL
from tests.serve_campaign.campaign import Campaign
from tests.serve_campaign.report import Plan, Report

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-mixtral"
SUPERVISORS = {"cold": ColdSupervisor, "warm": WarmSupervisor}
RAM_BYTES = 8 << 20
"""Less than the example's experts."""
TEMPLATE = """\
{%- for message in messages -%}<{{ message.role }}>{{ message.content }}{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""


def main() -> int:
    """Exit code 0 if nothing showed, 1 if something did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engine-kills", type=int, default=100, metavar="N", help="default 100, at least 5")
    add("--daemon-kills", type=int, default=20, metavar="N", help="default 20")
    add("--clients", type=int, default=16, metavar="N", help="at once (default 16)")
    add(
        "--restarts",
        choices=SUPERVISORS,
        default="cold",
        help="warm: under a stand-in for systemd that keeps the daemon's descriptors",
    )
    add("--seed", type=int, default=None, help="of the choices made (default: a new one, said)")
    add("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: nothing is left behind
    plan = Plan(
        engine_kills=max(5, arguments.engine_kills),
        daemon_kills=arguments.daemon_kills,
        clients=arguments.clients,
        seed=secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed,
    )
    with short_directory() as name, ProgressDisplay("Killing") as display:
        display.note(f"campaign with --seed {plan.seed}")
        directory = Path(name)
        pack = directory / "pack"
        subprocess.run(
            [sys.executable, "-m", "expertd", "pack", EXAMPLE, pack, "--scheme", "4bit"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        settings = directory / "daemon.toml"
        settings.write_text("")
        (directory / "chat.jinja").write_text(TEMPLATE)
        supervise = SUPERVISORS[arguments.restarts]
        with supervise(directory / "s", {MODEL: pack}, RAM_BYTES, settings) as supervisor:
            campaign = Campaign(plan, directory, pack, supervisor, display.update_count)
            report = asyncio.run(campaign.run())
    print(json.dumps(report.as_json(), indent=1) if arguments.json else described(report))
    return 0 if report.passed else 1


def described(report: Report) -> str:
    """For people."""
    kills = ", ".join(f"{number} {what}" for what, number in report.kills.items())
    lines = [
        f"killed      {kills} in {report.seconds:.0f} s, under {report.plan.clients} clients",
        f"answers     {report.answers} compared ({report.events} events): {report.wrong} wrong, "
        f"{report.failed} failed, {report.retried} asked again after the model was unloaded",
        f"pauses      {_described(report.pause_seconds)}; {report.preemptions} preemptions",
    ]
    lines += [
        f"left after  {name}: server {stock.server.num_files} descriptors, "
        f"{stock.server.num_threads} threads, heap {stock.server.anonymous_bytes / 2**20:.1f} MiB, "
        f"{stock.num_processes} processes, {stock.num_sessions} sessions; daemon "
        f"{stock.daemon.num_files} descriptors, heap "
        f"{stock.daemon.anonymous_bytes / 2**20:.1f} MiB"
        for name, stock in report.stocks.items()
    ]
    lines += report.problems
    lines.append("PASSED" if report.passed else f"FAILED (--seed {report.plan.seed})")
    return "\n".join(lines)


def _described(seconds: Sequence[float]) -> str:
    """The median and the longest."""
    if not seconds:
        return "none"
    return f"{statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} s at most"


if __name__ == "__main__":
    sys.exit(main())
