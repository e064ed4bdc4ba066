"""The Compose file and the services agree on their settings, and the file keeps what it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it has no types of its own

from molink.nats_config import NATS_MAX_PAYLOAD_BYTES
from molink_common.settings import ServiceSettings, variable_of
from molink_gateway.settings import GatewaySettings
from molink_scheduler.settings import SchedulerSettings
from molink_stage_worker.settings import StageWorkerSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
KINDS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "stage-worker": StageWorkerSettings,
}
# a name of its own cannot be given to one container of several, a file must be mounted first, the cache folder
# is the image's, and MOLINK_MODEL is what the pool serves, not what one worker has elsewhere
NOT_OFFERED = {
    "gateway": {"MOLINK_GATEWAY_ID", "MOLINK_NATS_CREDENTIALS_FILE"},
    "scheduler": {"MOLINK_NATS_CREDENTIALS_FILE"},
    "stage-worker": {"MOLINK_WORKER_ID", "MOLINK_NATS_CREDENTIALS_FILE", "MOLINK_CACHE", "MOLINK_MODEL"},
}


@pytest.mark.parametrize("service", KINDS)
def test_every_setting_of_a_service_can_be_set_and_nothing_else(service: str) -> None:
    known = {variable_of(field) for field in KINDS[service].model_fields}
    given = {name for name in SERVICES[service]["environment"] if name.startswith("MOLINK_")}
    assert given == known - NOT_OFFERED[service]


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_restarted_bounded_and_without_privileges(service: str) -> None:
    described = SERVICES[service]
    assert described["restart"] == "unless-stopped"
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit", "logging"} <= set(described)


@pytest.mark.parametrize("service", SERVICES)
def test_no_image_is_taken_without_a_version_and_each_can_be_replaced(service: str) -> None:
    match = re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-(.+):(.+)\}", SERVICES[service]["image"])
    assert match is not None
    assert service in KINDS or match[2] != "latest"


def test_workers_can_be_multiplied() -> None:
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["stage-worker"])


def test_only_the_scheduler_shares_a_network_with_the_store() -> None:
    assert [name for name, described in SERVICES.items() if "store" in described["networks"]] == ["redis", "scheduler"]


def test_nothing_waits_for_the_collector_of_traces() -> None:
    assert all("jaeger" not in described.get("depends_on", {}) for described in SERVICES.values())


def test_the_broker_takes_frames_as_large_as_everywhere_else() -> None:
    settings = dict(re.findall(r"^(\w+): (\S+)$", (DEPLOY / "nats-limits.conf").read_text(), re.MULTILINE))
    assert int(settings["max_payload"]) == NATS_MAX_PAYLOAD_BYTES
    assert settings["write_deadline"] == '"60s"'
