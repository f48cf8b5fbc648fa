"""Attacks a server of its own in every known way, and watches sixteen streams of another tenant meanwhile.

python scripts/attack.py                          five minutes of all kinds of attack
python scripts/attack.py --list                   the kinds, a line each
python scripts/attack.py --kinds bodies,rates.burst --minutes 1
python scripts/attack.py --faults --minutes 30    with killed processes, full disks and closed descriptors besides

The server is the demo in float32, with keys of five kinds. A fifth of the time, at most a minute, is calm: the victim's
streams run alone, and their tokens, gaps and the server's memory are what the attack is held to. Then the attackers, a
child process of the lowest priority, make rounds of the kinds in random order, `--at-once` of them at a time. With
--faults that is half of the time, and in the other half faults come besides.

What must hold       every answer of an attack is the one that the manual promises, and comes in time
                     every stream of the victim is whole, and its tokens are those of the calm
                     p99 of the victim's gaps is at most 3 times the calm one, memory at most 1.3 times
                     no process ends or is replaced, and the log shows no traceback
Beside faults        streams may pause, and those of a killed tokenizer process end; no gap is held to the calm
At the end           no request runs, no page is held, all processes are there and hold no more descriptors

Exit status 1 if a promise broke.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the mutator of the fuzz tests

import attacks.kinds  # noqa: E402, F401  registers all kinds
from attacks.kind import KINDS, choose  # noqa: E402
from attacks.run import Attack  # noqa: E402
from attacks.server import attacked_server  # noqa: E402


def main() -> int:
    """Runs the attack. Exit status 0 if all promises held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of the whole run, without start and end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", help="names or groups of kinds, separated by commas; default: all")
    parser.add_argument("--at-once", type=int, default=3, help="rounds that run at the same time")
    parser.add_argument("--nice", type=int, default=19, help="of the attackers; 0: the same priority as the server's")
    parser.add_argument(
        "--faults",
        nargs="?",
        const="faults",
        metavar="KINDS",
        help="kill processes, fill disks, close descriptors besides",
    )
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--log", type=Path, help="a file for the server's log")
    parser.add_argument("--list", action="store_true", help="list the kinds")
    args = parser.parse_args()
    try:
        kinds = choose(args.kinds, args.faults)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print("\n".join(f"{each.name:32} {each.summary}" for each in KINDS.values()))
        return 0
    seconds = args.minutes * 60
    with attacked_server(any(each.is_fault for each in kinds)) as server:
        attack = Attack(server, kinds, seed=args.seed, seconds=seconds, at_once=args.at_once, nice=args.nice)
        try:
            asyncio.run(attack.run())
        finally:
            log = server.launched.log()
            if args.log:
                args.log.write_text(log)
    report = attack.finish(log, server.launched.process.returncode)
    print(report.show())
    if args.json:
        args.json.write_text(json.dumps(report.json(), indent=1))
    return 1 if report.broken() else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
