"""Keys in the scheduler's machine: added, revoked, charged, kept."""

from __future__ import annotations

import pytest

from molink_common.messages import (
    MAX_KEYS,
    Admitted,
    ApiKey,
    Done,
    Failed,
    FinishReason,
    KeyLimits,
    Keys,
    RefusalCode,
    Refused,
    ResumeSequence,
    SubmitSequence,
    hash_of_secret,
)
from molink_scheduler.events import (
    Event,
    KeyAddAsked,
    KeyRevokeAsked,
    KeysAsked,
    KeySaved,
    Restored,
    ResumeAsked,
    SequenceSaved,
    SequenceSubmitted,
    StoreChanged,
    StoreEmptied,
    Tick,
    TokensArrived,
)
from molink_scheduler.instructions import (
    BroadcastState,
    DeleteKey,
    FailSequence,
    Instruction,
    ReplyTo,
    SaveKey,
    SaveUsage,
    StopSequenceAt,
)
from molink_scheduler.limits import DAY_S
from molink_scheduler.machine import Machine
from molink_scheduler.records import KeyUsage, Snapshot
from tests.scheduler_builders import S1, S2, Driver, make_request, make_settings, make_step, ready_driver, run_sequence

NOON_S = 20_000 * DAY_S + DAY_S / 2


def make_key(name: str = "alice", *, number: int = 1, revoked_s: int | None = None, **limits: int) -> ApiKey:
    return ApiKey(
        id=f"key-{number}",
        name=name,
        secret_sha256=hash_of_secret(f"secret {number}"),
        created_s=1,
        limits=KeyLimits(**limits),
        revoked_s=revoked_s,
    )


def request_of(sequence: str, *, tenant: str = "key-1", choice: int = 0) -> SubmitSequence:
    return make_request(sequence).model_copy(update={"tenant": tenant, "choice": choice})


def replies(done: list[Instruction]) -> list[object]:
    return [one.message for one in done if isinstance(one, ReplyTo)]


def submit(driver: Driver, request: SubmitSequence) -> Refused | None:
    """None: it is on its way."""
    answers = replies(driver.do(SequenceSubmitted(request, 7)))
    if not answers:
        return None
    assert isinstance(answers[0], Refused)
    return answers[0]


def table(driver: Driver) -> Keys:
    (keys,) = replies(driver.do(KeysAsked(1)))
    assert isinstance(keys, Keys)
    return keys


def add(driver: Driver, key: ApiKey) -> None:
    assert driver.do(KeyAddAsked(key, 1)) == [SaveKey(key)]
    assert driver.do(KeySaved(key.id)) == [ReplyTo(1, Done())]


@pytest.fixture
def driver() -> Driver:
    driver = ready_driver()
    driver.do(Tick(utc_s=NOON_S))
    return driver


def test_a_key_is_confirmed_when_the_store_has_it(driver: Driver) -> None:
    before = driver.machine.state(now_s=driver.now_s).keys_revision
    assert before == ""
    add(driver, make_key())
    assert isinstance(driver.all[-2], BroadcastState), "gateways hear of it first"
    revision = driver.machine.state(now_s=driver.now_s).keys_revision
    assert revision
    assert table(driver) == Keys(revision=revision, keys=(make_key(),))


def test_the_same_order_again_is_answered_again(driver: Driver) -> None:
    driver.do(KeyAddAsked(make_key(), 1))
    assert driver.do(KeyAddAsked(make_key(), 2)) == [SaveKey(make_key())]
    assert driver.do(KeySaved("key-1")) == [ReplyTo(1, Done()), ReplyTo(2, Done())]
    assert replies(driver.do(KeySaved("key-1"))) == []


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (make_key("other"), "id"),
        (make_key(number=2), "name"),
        (make_key("other", number=2).model_copy(update={"secret_sha256": make_key().secret_sha256}), "secret"),
        (make_key("other", number=2, revoked_s=1), "revoked"),
    ],
)
def test_what_cannot_be_added_is_refused_with_a_reason(driver: Driver, key: ApiKey, problem: str) -> None:
    add(driver, make_key())
    (failed,) = replies(driver.do(KeyAddAsked(key, 2)))
    assert isinstance(failed, Failed)
    assert problem in failed.message
    assert table(driver).keys == (make_key(),)


def test_no_key_is_added_while_the_store_is_away(driver: Driver) -> None:
    driver.do(StoreChanged(False))
    (failed,) = replies(driver.do(KeyAddAsked(make_key(), 2)))
    assert isinstance(failed, Failed)
    assert "Redis" in failed.message


def test_a_revoked_key_ends_what_runs_with_it_and_lets_nobody_in(driver: Driver) -> None:
    add(driver, make_key())
    add(driver, make_key("bob", number=2))
    run_sequence(driver, request_of(S1))
    run_sequence(driver, request_of(S2, tenant="key-2"))
    before = driver.machine.state(now_s=driver.now_s).keys_revision
    done = driver.do(KeyRevokeAsked("key-1", 5))
    failed = [one for one in done if isinstance(one, FailSequence)]
    assert [one.failed.sequence for one in failed] == [S1]
    assert [one.stop.sequence for one in done if isinstance(one, StopSequenceAt)] == [S1]
    assert done[-1] == SaveKey(make_key(revoked_s=int(NOON_S)))
    assert list(driver.machine.books.sequences) == [S2]
    state = driver.machine.state(now_s=driver.now_s)
    assert state.keys_revision not in ("", before)
    refused = submit(driver, request_of(S1))
    assert refused is not None
    assert refused.code is RefusalCode.REVOKED
    assert replies(driver.do(KeySaved("key-1"))) == [Done()]


def test_a_sequence_that_is_being_saved_is_answered_when_its_key_is_revoked(driver: Driver) -> None:
    add(driver, make_key())
    assert submit(driver, request_of(S1)) is None
    (answer,) = replies(driver.do(KeyRevokeAsked("key-1", 5)))
    assert isinstance(answer, Refused)
    assert not driver.machine.books.sequences


def test_revoking_is_in_effect_without_the_store_and_needs_a_key(driver: Driver) -> None:
    add(driver, make_key())
    driver.do(StoreChanged(False))
    driver.do(KeyRevokeAsked("key-1", 5))
    assert table(driver).keys[0].revoked_s is not None
    (failed,) = replies(driver.do(KeyRevokeAsked("key-9", 6)))
    assert isinstance(failed, Failed)


def test_a_name_is_free_again_when_its_key_is_revoked(driver: Driver) -> None:
    add(driver, make_key())
    driver.do(KeyRevokeAsked("key-1", 5))
    add(driver, make_key(number=2))


def test_the_oldest_revoked_key_makes_room() -> None:
    keys = [make_key(f"n{n}", number=n, revoked_s=9 - n if n in (3, 4) else None) for n in range(MAX_KEYS)]
    driver = Driver(snapshot=Snapshot(keys=tuple(keys), usage=(KeyUsage(key="key-4", day=1, tokens=1),)))
    new = make_key("new", number=MAX_KEYS)
    assert driver.do(KeyAddAsked(new, 1)) == [DeleteKey("key-4"), SaveKey(new)]
    newer = make_key("newer", number=MAX_KEYS + 1)
    assert driver.do(KeyAddAsked(newer, 1)) == [DeleteKey("key-3"), SaveKey(newer)]
    (failed,) = replies(driver.do(KeyAddAsked(make_key("newest", number=MAX_KEYS + 2), 1)))
    assert isinstance(failed, Failed)


def test_only_what_is_admitted_counts_as_a_request(driver: Driver) -> None:
    add(driver, make_key(requests_per_minute=1))
    unknown = request_of(S1).model_copy(update={"model": "no such"})
    for _ in range(3):
        refused = submit(driver, unknown)
        assert refused is not None
        assert refused.code is RefusalCode.UNKNOWN_MODEL
    assert submit(driver, request_of(S1)) is None
    assert submit(driver, request_of(S2, choice=1)) is None, "another answer of a request that is counted"
    refused = submit(driver, request_of("00000000000000a3"))
    assert refused is not None
    assert (refused.code, refused.retry_after_s) == (RefusalCode.RATE_LIMITED, 60)
    assert submit(driver, request_of("00000000000000a4", tenant="")) is None, "limits are a key's own"


def test_a_place_is_free_when_a_sequence_has_ended(driver: Driver) -> None:
    add(driver, make_key(concurrent=1))
    run_sequence(driver, request_of(S1))
    refused = submit(driver, request_of(S2))
    assert refused is not None
    assert refused.code is RefusalCode.RATE_LIMITED
    driver.do(TokensArrived(make_step(1, (S1, 1, 12, FinishReason.STOP))))
    assert submit(driver, request_of(S2)) is None


def test_prompt_and_tokens_are_charged_once_and_the_store_is_told_seconds_later(driver: Driver) -> None:
    add(driver, make_key(tokens_per_day=6))
    run_sequence(driver, request_of(S1))
    driver.do(TokensArrived(make_step(1, (S1, 0, 11, None))))  # a second time
    assert table(driver).tokens_today == {"key-1": 4}
    assert submit(driver, request_of(S2)) is None
    driver.do(SequenceSaved(S2))
    driver.do(TokensArrived(make_step(1, (S1, 1, 12, None))))
    driver.do(TokensArrived(make_step(1, (S1, 2, 12, FinishReason.STOP))))
    refused = submit(driver, request_of("00000000000000a3"))
    assert refused is not None
    assert (refused.code, refused.retry_after_s) == (RefusalCode.QUOTA, DAY_S / 2)
    saves = [one for one in driver.wait(2.5) if isinstance(one, SaveUsage)]
    assert saves == [SaveUsage(KeyUsage(key="key-1", day=20_000, tokens=6))]
    assert not [one for one in driver.wait(5) if isinstance(one, SaveUsage)], "what the store knows is not told again"
    driver.do(Tick(utc_s=NOON_S + DAY_S))
    assert table(driver).tokens_today == {}


def test_the_next_scheduler_has_the_same_keys_and_counts(driver: Driver) -> None:
    key, gone = make_key(tokens_per_day=6), make_key("bob", number=2, revoked_s=3)
    revision = ""
    for _ in range(2):
        machine = Machine(make_settings())
        snapshot = Snapshot(keys=(key, gone), usage=(KeyUsage(key="key-1", day=20_000, tokens=6),))
        machine.handle(Restored(snapshot, NOON_S), now_s=1)
        state = machine.state(now_s=1)
        assert revision in ("", state.keys_revision), "the same table has the same revision"
        revision = state.keys_revision
        (reply,) = machine.handle(KeysAsked(1), now_s=1)
        assert isinstance(reply, ReplyTo)
        assert reply.message == Keys(revision=revision, keys=(key, gone), tokens_today={"key-1": 6})


def test_a_store_that_has_forgotten_everything_is_told_the_keys(driver: Driver) -> None:
    add(driver, make_key())
    run_sequence(driver, request_of(S1))
    driver.do(StoreEmptied())
    assert SaveKey(make_key()) in driver.all[-6:]
    assert SaveUsage(KeyUsage(key="key-1", day=20_000, tokens=4)) in driver.all[-6:]


@pytest.mark.parametrize(("tenant", "is_theirs"), [("key-1", True), ("key-2", False), ("", False), (None, True)])
def test_a_stream_is_taken_up_only_with_the_key_that_began_it(
    driver: Driver, tenant: str | None, is_theirs: bool
) -> None:
    add(driver, make_key())
    run_sequence(driver, request_of(S1).model_copy(update={"resume_state": "{}"}))
    event: Event = ResumeAsked(ResumeSequence(sequence=S1, gateway="g2", tenant=tenant), 9)
    (answer,) = replies(driver.do(event))
    assert isinstance(answer, Failed) is not is_theirs
    assert driver.machine.books.sequences[S1].gateway == ("g2" if is_theirs else "g1")


def test_a_request_without_a_key_knows_no_limits(driver: Driver) -> None:
    add(driver, make_key(requests_per_minute=1, concurrent=1, tokens_per_day=1))
    for number in range(5):
        sequence = f"{number:016x}"
        assert submit(driver, request_of(sequence, tenant="")) is None
        assert replies(driver.do(SequenceSaved(sequence))) == [Admitted(sequence=sequence)]
