"""Which broker a worker's flags ask for."""

from __future__ import annotations

import pytest

from molink.nats_config import Credentials
from molink.site_worker import SiteChoice, site_choice
from molink_common.errors import SettingsError


def test_without_a_hub_the_arguments_are_the_workers_own() -> None:
    arguments = ["--site", "home", "--nats-url", "nats://a:1"]
    assert site_choice(arguments, {"MOLINK_HUB": ""}) == (None, arguments)


@pytest.mark.parametrize(
    ("arguments", "environment", "rest"),
    [
        (["--hub", "nats://hub", "--site", "home", "--threads", "2"], {}, ["--site", "home", "--threads", "2"]),
        (["--site=home", "--hub=hub:7422"], {"MOLINK_HUB": "elsewhere"}, ["--site=home"]),
        ([], {"MOLINK_HUB": "hub", "MOLINK_SITE": "home", "MOLINK_NATS_URL": "nats://ignored"}, []),
    ],
)
def test_the_hub_is_taken_out_and_the_site_stays_in(
    arguments: list[str], environment: dict[str, str], rest: list[str]
) -> None:
    assert site_choice(arguments, environment) == (SiteChoice(site="home", hub=("hub:7422",)), rest)


def test_user_and_password_are_the_brokers_and_the_workers() -> None:
    arguments = ["--hub", "hub", "--site", "home", "--nats-user", "pool"]
    choice, rest = site_choice(arguments, {"MOLINK_NATS_PASSWORD": "secret", "MOLINK_NATS_USER": "other"})
    assert choice is not None
    assert choice.credentials == Credentials(user="pool", password="secret")
    assert rest == ["--site", "home", "--nats-user", "pool"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--hub", "hub"], "needs --site"),
        (["--site", "home", "--hub"], "--hub needs a value"),
        (["--hub", "--site", "home"], "--hub needs a value"),
        (["--hub", "hub", "--site", "home", "--nats-url=nats://a"], "--nats-url exclude"),
        (["--hub", "hub", "--site", "home", "--nats-credentials-file", "f"], "--nats-credentials-file"),
        (["--hub", "hub", "--site", "home", "--nats-user", "pool"], "belong together"),
        (["--hub", "hub", "--site", "my home"], "--site"),
        (["--hub", "ftp://hub", "--site", "home"], "--hub"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        site_choice(arguments, {})
