"""One end of a probe. It runs on a host of a laboratory, by path, and needs nothing but the standard library.

    probe_end.py serve DEVICE SECONDS                   echoes datagrams; takes one bulk flow and says how it went
    probe_end.py ask ADDRESS PINGS TIMEOUT_S SECONDS    sends datagrams one by one, then a bulk flow of SECONDS
    probe_end.py watch DEVICE EVERY_S                   says how many bytes came through, again and again, until killed

The first two print ``listening`` (the server) and then one JSON object; the watcher prints a line each time, of time
(`time.perf_counter`) and bytes.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path

PORT = 9901
_CHUNK_BYTES = 256 * 1024
_MARKS = (0.5, 0.95)
"""Shares of the time between which the flow is called steady: past its start, before its end."""


def serve(device: str, seconds: float) -> None:
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("0.0.0.0", PORT))
    threading.Thread(target=_echo, args=(echo,), daemon=True).start()
    with socket.create_server(("0.0.0.0", PORT)) as listener:
        print("listening", flush=True)
        connection, _ = listener.accept()
    buffer = bytearray(_CHUNK_BYTES)
    started_s = time.monotonic()
    total = 0
    # when, payload so far, bytes that came through the device so far
    marks: list[tuple[float, int, int]] = []
    with connection:
        while size := connection.recv_into(buffer):
            total += size
            now_s = time.monotonic()
            if len(marks) < len(_MARKS) and now_s >= started_s + _MARKS[len(marks)] * seconds:
                marks.append((now_s, total, _received_bytes(device)))
    lasted_s = time.monotonic() - started_s
    (from_s, had, had_wire), (to_s, has, has_wire) = marks[0], marks[-1]
    steady_s = max(1e-9, to_s - from_s)
    flow = {
        "bit_per_s": total * 8 / lasted_s,
        "steady_bit_per_s": (has - had) * 8 / steady_s,
        "wire_bit_per_s": (has_wire - had_wire) * 8 / steady_s,
    }
    print(json.dumps(flow), flush=True)


def watch(device: str, every_s: float) -> None:
    while True:
        print(time.perf_counter(), _received_bytes(device), flush=True)
        time.sleep(every_s)


def _received_bytes(device: str) -> int:
    # proc(5), /proc/net/dev: the first number after the name is the bytes received
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith(device + ":"))


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
        serve(sys.argv[2], float(sys.argv[3]))
    elif sys.argv[1] == "watch":
        watch(sys.argv[2], float(sys.argv[3]))
    else:
        ask(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
