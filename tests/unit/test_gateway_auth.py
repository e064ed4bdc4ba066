"""Who is let in, whatever the network."""

from __future__ import annotations

import inspect

import pytest
from starlette.datastructures import Headers

from molink_common.messages import ApiKey, Keys, RefusalCode, Refused, hash_of_secret, new_secret
from molink_gateway import api_errors
from molink_gateway.api_errors import ApiError
from molink_gateway.auth import ANONYMOUS, Doorkeeper, RequireKeys, given_secret
from molink_gateway.scheduler_link import error_of_refusal

SECRET = new_secret()
KEY = ApiKey(id="key-1", name="alice", secret_sha256=hash_of_secret(SECRET), created_s=1)
REVOKED = new_secret()
TABLE = Keys(
    revision="r",
    keys=(
        KEY,
        ApiKey(id="key-2", name="bob", secret_sha256=hash_of_secret(REVOKED), created_s=1, revoked_s=2),
    ),
)


def informed(require_keys: RequireKeys = "auto", *, is_loopback: bool = True, table: Keys | None = None) -> Doorkeeper:
    doorkeeper = Doorkeeper(require_keys, is_loopback=is_loopback)
    doorkeeper.hear(table or Keys(revision=""))
    return doorkeeper


def status_of(doorkeeper: Doorkeeper, secret: str | None) -> int | str:
    """The tenant, or the status of the refusal."""
    try:
        return doorkeeper.tenant_of(Headers({} if secret is None else {"authorization": f"Bearer {secret}"}))
    except ApiError as error:
        assert secret is None or secret not in error.message
        return error.status


@pytest.mark.parametrize("require_keys", ["auto", "always", "once-added"])
def test_who_has_not_heard_lets_nobody_in_and_says_when_to_come_back(require_keys: RequireKeys) -> None:
    doorkeeper = Doorkeeper(require_keys, is_loopback=True)
    for secret in (SECRET, None):
        with pytest.raises(ApiError) as raised:
            doorkeeper.tenant_of(Headers({} if secret is None else {"x-api-key": secret}))
        assert raised.value.status == 503
        assert "retry-after" in raised.value.headers()


@pytest.mark.parametrize(
    ("require_keys", "is_loopback", "is_open"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("once-added", True, True),
        ("once-added", False, True),
        ("always", True, False),
        ("always", False, False),
    ],
)
def test_before_the_first_key_it_depends(require_keys: RequireKeys, is_loopback: bool, is_open: bool) -> None:
    doorkeeper = informed(require_keys, is_loopback=is_loopback)
    assert status_of(doorkeeper, None) == (ANONYMOUS if is_open else 401)
    assert status_of(doorkeeper, "not-a-key") == (ANONYMOUS if is_open else 401), "clients must send something"
    assert status_of(doorkeeper, SECRET) == 401
    doorkeeper.hear(TABLE)
    assert [status_of(doorkeeper, one) for one in (None, "not-a-key", SECRET, REVOKED)] == [401, 401, "key-1", 401]


def test_a_table_that_is_lost_opens_nothing() -> None:
    doorkeeper = informed("once-added", table=TABLE)
    doorkeeper.hear(Keys(revision=""))
    assert [status_of(doorkeeper, one) for one in (None, SECRET)] == [401, 401]
    assert status_of(informed(table=TABLE.model_copy(update={"keys": TABLE.keys[1:]})), None) == 401, "all are revoked"


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ({}, None),
        ({"authorization": "Bearer a"}, "a"),
        ({"Authorization": "bearer   a  "}, "a"),
        ({"authorization": "Bearer a", "x-api-key": "b"}, "a"),
        ({"authorization": "Bearer ", "x-api-key": "b"}, "b"),
        ({"authorization": "Basic a"}, None),
        ({"authorization": "a"}, None),
        ({"x-api-key": " b "}, "b"),
        ({"x-api-key": ""}, None),
    ],
)
def test_a_secret_stands_where_clients_put_it(headers: dict[str, str], secret: str | None) -> None:
    assert given_secret(Headers(headers)) == secret


def test_secrets_are_long_and_never_the_same() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(len(one) == len("sk-molink-") + 43 for one in made), "32 bytes in base64"


def _made_by(maker: object, name: str) -> ApiError:
    """What a maker of errors makes, whatever it wants to be told."""
    values = {"str": "x", "int": 7, "tuple[str, ...]": (), "float": 0.0, "str | None": None, "bool": False}
    signature = inspect.signature(maker)  # type: ignore[arg-type]
    given = {
        parameter.name: values[str(parameter.annotation)]
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
    }
    error = maker(**given)  # type: ignore[operator]
    assert isinstance(error, ApiError), name
    return error


def all_errors() -> list[ApiError]:
    """One of each maker, of each refusal, and the two without a maker."""
    makers = [
        (name, maker)
        for name, maker in inspect.getmembers(api_errors, inspect.isfunction)
        if maker.__module__ == api_errors.__name__
    ]
    assert len(makers) >= 7
    refusals = [Refused(sequence="0" * 16, code=code, message="x") for code in RefusalCode]
    return [
        *(_made_by(maker, name) for name, maker in makers),
        *(error_of_refusal(refused) for refused in refusals),
        ApiError(429, "x"),
        ApiError(503, "x"),
    ]


def test_whoever_is_told_to_come_back_is_told_when_and_whoever_needs_a_key_how() -> None:
    errors = all_errors()
    assert {401, 429, 503} <= {error.status for error in errors}
    for error in errors:
        headers = error.headers()
        assert ("retry-after" in headers) == (error.status in (429, 503)), error.message
        assert int(headers.get("retry-after", 1)) >= 1
        assert (headers.get("www-authenticate") == "Bearer") == (error.status == 401)
        assert set(error.body()["error"]) == {"message", "type", "param", "code"}
