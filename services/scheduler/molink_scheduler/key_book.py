"""The table of API keys and what each has used. Pure: time is an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from molink_common.messages import ApiKey, Keys, RefusalCode, SubmitSequence
from molink_scheduler.instructions import SaveKey, SaveUsage
from molink_scheduler.limits import DAY_S, Account, Limited, why_limited
from molink_scheduler.records import KeyUsage, Snapshot

SAVE_EVERY_S = 2.0
"""How far the store's counts of tokens may lag behind: what a lost scheduler forgets."""


class KeyBook:
    """All keys, those revoked too, so that the last one's end does not open the door to everybody."""

    def __init__(self) -> None:
        self._keys: dict[str, ApiKey] = {}
        self._accounts: dict[str, Account] = {}
        self._utc_ahead_s = 0.0
        self._saved_s = 0.0
        self.revision = ""
        self.replies: dict[str, list[int]] = {}
        """By key: who waits until the store has it."""

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: str) -> ApiKey | None:
        """The key with this id."""
        return self._keys.get(key)

    def put(self, key: ApiKey) -> None:
        """Add a key, or have it as it is now."""
        self._keys[key.id] = key
        self._revise()

    def drop(self, key: str) -> None:
        """Forget a key and what it has used."""
        del self._keys[key]
        self._accounts.pop(key, None)
        self._revise()

    def set_clock(self, utc_s: float, now_s: float) -> None:
        """It is so late now, in seconds since 1970."""
        self._utc_ahead_s = utc_s - now_s

    def utc_s(self, now_s: float) -> float:
        """Seconds since 1970."""
        return now_s + self._utc_ahead_s

    def restore(self, snapshot: Snapshot) -> None:
        """Begin with what was kept. Buckets begin full."""
        self._keys = {key.id: key for key in snapshot.keys}
        self._accounts = {
            one.key: Account(day=one.day, tokens=one.tokens) for one in snapshot.usage if one.key in self._keys
        }
        self._revise()

    def table(self, now_s: float) -> Keys:
        """For gateways and operators."""
        day = self._day(now_s)
        used = {key: account.tokens_on(day) for key, account in self._accounts.items()}
        return Keys(
            revision=self.revision,
            keys=tuple(self._keys.values()),
            tokens_today={key: tokens for key, tokens in used.items() if tokens},
        )

    def why_limited(self, request: SubmitSequence, running: Iterable[str], now_s: float) -> Limited | None:
        """Why a sequence may not come in now; who has no key has no limits. `running`: the tenants of all sequences."""
        key = self._keys.get(request.tenant)
        if key is None:
            return None
        if key.revoked_s is not None:
            return Limited(code=RefusalCode.REVOKED, message="this API key is revoked", retry_after_s=0)
        return why_limited(
            key.limits,
            self._account(key.id),
            is_request=request.choice == 0,
            num_running=sum(tenant == key.id for tenant in running) if key.limits.concurrent is not None else 0,
            now_s=now_s,
            utc_s=self.utc_s(now_s),
        )

    def admitted(self, request: SubmitSequence, now_s: float) -> None:
        """Count a request that has come in."""
        key = self._keys.get(request.tenant)
        if key is not None and request.choice == 0 and key.limits.requests_per_minute is not None:
            self._account(key.id).take_request(key.limits.requests_per_minute, now_s)

    def charge(self, tenant: str, tokens: int, now_s: float) -> None:
        """Count tokens, if they are a key's."""
        if tenant in self._keys:
            self._account(tenant).charge(tokens, self._day(now_s))

    def time_passed(self, now_s: float) -> Iterator[SaveUsage]:
        """Have the store told what has been used, now and then."""
        if now_s - self._saved_s < SAVE_EVERY_S:
            return
        self._saved_s = now_s
        for name, account in self._accounts.items():
            if not account.is_saved:
                account.is_saved = True
                yield _usage(name, account)

    def everything(self) -> Iterator[SaveKey | SaveUsage]:
        """For a store that has forgotten it."""
        yield from (SaveKey(key) for key in self._keys.values())
        yield from (_usage(name, account) for name, account in self._accounts.items() if account.tokens)

    def _account(self, key: str) -> Account:
        return self._accounts.setdefault(key, Account())

    def _day(self, now_s: float) -> int:
        return int(self.utc_s(now_s) // DAY_S)

    def _revise(self) -> None:
        """What the table holds is its revision, so that the next scheduler has the same one."""
        texts = [self._keys[key].model_dump_json() for key in sorted(self._keys)]
        self.revision = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32] if texts else ""


def _usage(name: str, account: Account) -> SaveUsage:
    return SaveUsage(KeyUsage(key=name, day=account.day, tokens=account.tokens))
