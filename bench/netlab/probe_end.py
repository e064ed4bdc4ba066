"""One end of a probe. It runs on a host of a laboratory, by path, and needs nothing but the standard library.

    probe_end.py serve                                  echoes datagrams; takes one bulk flow and says how it went
    probe_end.py ask ADDRESS PINGS TIMEOUT_S SECONDS    sends datagrams one by one, then a bulk flow of SECONDS

Each prints ``listening`` (the server) and then one JSON object.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

PORT = 9901
_CHUNK_BYTES = 256 * 1024


def serve() -> None:
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("0.0.0.0", PORT))
    threading.Thread(target=_echo, args=(echo,), daemon=True).start()
    with socket.create_server(("0.0.0.0", PORT)) as listener:
        print("listening", flush=True)
        connection, _ = listener.accept()
    buffer = bytearray(_CHUNK_BYTES)
    arrivals: list[tuple[float, int]] = []
    total = 0
    with connection:
        while size := connection.recv_into(buffer):
            total += size
            arrivals.append((time.monotonic(), total))
    print(json.dumps(_rates(arrivals)), flush=True)


def _rates(arrivals: list[tuple[float, int]]) -> dict[str, float]:
    """Of the whole flow, and of its second half in time, which the start does not slow down."""
    (first_s, first), (last_s, last) = arrivals[0], arrivals[-1]
    middle_s, middle = next(one for one in arrivals if one[0] >= (first_s + last_s) / 2)
    return {
        "bytes": last,
        "bit_per_s": (last - first) * 8 / max(1e-9, last_s - first_s),
        "steady_bit_per_s": (last - middle) * 8 / max(1e-9, last_s - middle_s),
    }


def _echo(echo: socket.socket) -> None:
    while True:
        data, sender = echo.recvfrom(2048)
        echo.sendto(data, sender)


def ask(address: str, pings: int, timeout_s: float, seconds: float) -> None:
    round_trips_s = _ping(address, pings, timeout_s)
    if seconds > 0:
        with socket.create_connection((address, PORT), timeout=10) as connection:
            data = bytes(_CHUNK_BYTES)
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                connection.sendall(data)
    print(json.dumps({"round_trips_s": round_trips_s, "unanswered": pings - len(round_trips_s)}), flush=True)


def _ping(address: str, pings: int, timeout_s: float) -> list[float]:
    round_trips_s: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(timeout_s)
        for number in range(pings):
            word = number.to_bytes(4, "big") + bytes(60)
            sent_s = time.monotonic()
            try:
                asking.sendto(word, (address, PORT))
                while asking.recv(2048) != word:  # an answer to one that was given up
                    pass
            except OSError:  # no answer in time, or no way there
                continue
            round_trips_s.append(time.monotonic() - sent_s)
    return round_trips_s


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        ask(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
