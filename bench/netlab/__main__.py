"""The network laboratory from the command line. It needs root on Linux; `python -m bench.netlab.proxy` does not.

python -m bench.netlab serve TOPOLOGY.toml                        the real system, until Ctrl-C
python -m bench.netlab probe --rate-mbit 100 --round-trip-ms 30   what such a link gives
python -m bench.netlab selftest                                   whether the laboratory works here
python -m bench.netlab clean                                      remove what killed runs left behind
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.netlab.lab import open_lab
from bench.netlab.probe import describe, expected_goodput_bit_per_s, measure, show_ms
from bench.netlab.registry import clean
from bench.netlab.selftest import selftest
from bench.netlab.serving import serving
from bench.netlab.topology import LinkSpec, Topology, two_hosts
from bench.netlab.topology_file import read_topology
from molink_common.errors import MolinkError


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    try:
        match arguments.command:
            case "serve":
                topology = read_topology(arguments.topology)
                asyncio.run(_serve(topology, arguments.model, arguments.logs))
            case "probe":
                spec = LinkSpec(
                    rate_bit_per_s=arguments.rate_mbit * 1e6 if arguments.rate_mbit else None,
                    round_trip_s=arguments.round_trip_ms / 1e3,
                    loss=arguments.loss_percent / 100,
                )
                asyncio.run(_probe(spec, arguments.seconds))
            case "selftest":
                is_good = asyncio.run(selftest(lambda line: print(line, flush=True), seconds=arguments.seconds))
                print("all good" if is_good else "not all is as it should be", flush=True)
                return 0 if is_good else 1
            case _:
                print("removed: " + (", ".join(clean()) or "nothing"))
    except (MolinkError, OSError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


async def _serve(topology: Topology, model: str, logs: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="molink-netlab-") as folder:
        async with serving(topology, logs or Path(folder), model=model) as system:
            print(f"ready: {system.url}/v1   (Ctrl-C stops everything; logs: {logs or folder})", flush=True)
            await asyncio.Event().wait()


async def _probe(spec: LinkSpec, seconds: float) -> None:
    async with open_lab(two_hosts(spec)) as lab:
        found = await measure(lab, "a", "b", seconds=seconds)
        counters = await lab.counters("a", "b")
    wanted = expected_goodput_bit_per_s(spec)
    limit = "" if wanted is None else f"; at most {wanted / 1e6:.2f} beside the headers"
    print(f"{describe(spec)}: round trip {show_ms(found.round_trip_s)} (best {show_ms(found.least_round_trip_s)})")
    print(
        f"one TCP flow of {seconds:g} s: {found.goodput_bit_per_s / 1e6:.2f} Mbit/s, "
        f"{found.steady_goodput_bit_per_s / 1e6:.2f} past its start{limit}; "
        f"{found.wire_bit_per_s / 1e6:.2f} on the wire then"
    )
    if counters is not None and found.emulator_cores is not None:
        print(f"the emulator took {found.emulator_cores:.2f} of a core; there: {counters[0]}; back: {counters[1]}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.netlab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="the real system on a topology, until Ctrl-C")
    serve.add_argument("topology", type=Path)
    serve.add_argument("--model", default="demo")
    serve.add_argument("--logs", type=Path, default=None, help="folder for logs that stays")
    probe = commands.add_parser("probe", help="round trip and goodput of a link")
    probe.add_argument("--rate-mbit", type=float, default=None, help="left out: unlimited")
    probe.add_argument("--round-trip-ms", type=float, default=0.0)
    probe.add_argument("--loss-percent", type=float, default=0.0)
    probe.add_argument("--seconds", type=float, default=5.0)
    test = commands.add_parser("selftest", help="whether the laboratory works on this machine")
    test.add_argument("--seconds", type=float, default=3.0, help="of each bulk flow")
    commands.add_parser("clean", help="remove what killed runs left behind")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
