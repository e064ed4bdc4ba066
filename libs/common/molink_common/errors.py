"""The tree of errors.

MolinkError
├── SettingsError        a flag or an environment variable is wrong; says which and what would be right
├── ModelError           a model cannot be found, read or served
├── ProtocolError        a peer sent what this version cannot read
├── BusError             NATS
│   ├── BusUnavailable   no connection within the time that the caller allowed
│   ├── NobodyListens    a request reached no subscriber
│   └── RequestTimeout   a subscriber did not answer in time
└── CapacityError        more was asked for than there is room for
"""

from __future__ import annotations


class MolinkError(Exception):
    """Root of every error that MoLink raises on purpose."""


class SettingsError(MolinkError):
    """A setting is wrong. The message names the setting and the fix."""


class ModelError(MolinkError):
    """A model cannot be found, read or served. The message says why and what would work."""


class ProtocolError(MolinkError):
    """Bytes from a peer do not parse as this version's messages or frames."""


class BusError(MolinkError):
    """Something between this process and NATS went wrong."""


class BusUnavailable(BusError):
    """No connection to NATS within the time allowed."""


class NobodyListens(BusError):
    """A request was delivered to nobody: no process subscribes to its subject."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"nobody listens on {subject}")
        self.subject = subject


class RequestTimeout(BusError):
    """A request was not answered in time."""

    def __init__(self, subject: str, timeout_s: float) -> None:
        super().__init__(f"no answer on {subject} within {timeout_s:g} s")
        self.subject = subject
        self.timeout_s = timeout_s


class CapacityError(MolinkError):
    """A bounded resource (KV blocks, a queue) has no room for what was asked."""
