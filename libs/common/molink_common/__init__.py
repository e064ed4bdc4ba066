"""What every part of MoLink shares: names, messages, frames, the door to NATS, settings, logs and traces.

- ``errors``    the tree of errors
- ``identity``  sequence and worker ids
- ``subjects``  every NATS subject, built in one place
- ``sampling``  the sampling options of a request
- ``messages``  control messages (orjson, typed, versioned)
- ``wire``      activation frames (fixed binary header and raw tensor bytes)
- ``bus``       the one door to NATS
- ``settings``  flags and environment, read once, unknown ones refused
- ``logs``      one structured line an event
- ``telemetry`` OpenTelemetry set-up
- ``service``   how a service starts and stops
- ``folders``   where what can be fetched again is kept
"""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
