"""Which clients a run takes, what it makes of their lines, and when an environment is made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.catalogue import CLIENTS_FOLDER, ROOT, Client, Kind, chosen
from tests.clients.environments import Environments, NoEnvironment, version_of
from tests.clients.outcomes import Outcome, judged, read_outcome, table


def outcome(*, check: str = "chat", ok: bool = True, client: str = "llm") -> Outcome:
    return Outcome(client=client, check=check, ok=ok, detail="seen", seconds=1.0)


def test_no_names_choose_every_client() -> None:
    assert {"openai-python", "openai-node", "langchain", "litellm", "llm", "pydantic-ai", "instructor", "ai-sdk"} <= {
        client.name for client in chosen([])
    }


def test_names_choose_those_and_a_wrong_one_is_told() -> None:
    assert [client.name for client in chosen(["litellm", "openai-node"])] == ["openai-node", "litellm"]
    with pytest.raises(ValueError, match="no client gpt; there are openai-python"):
        chosen(["gpt"])


@pytest.mark.parametrize("client", chosen([]), ids=lambda client: client.name)
def test_every_client_has_a_program_and_its_version_in_the_docs(client: Client) -> None:
    program = {Kind.PYTHON: "client.py", Kind.NODE: "client.mjs", Kind.OWN: "run.py"}[client.kind]
    assert (client.place / program).exists()
    assert f"`{version_of(client)}`" in (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")


def test_a_line_is_read_and_what_else_is_printed_is_not_one() -> None:
    line = json.dumps({"client": "llm", "check": "chat", "ok": True, "detail": "seen", "seconds": 1.0})
    assert read_outcome(line) == outcome()
    assert read_outcome("Traceback (most recent call last):") is None
    assert read_outcome('{"level": "info"}') is None
    assert read_outcome("[1]") is None


def test_a_program_that_checks_nothing_has_failed() -> None:
    (only,) = judged("llm", [], 0, "ImportError")
    assert not only.ok
    assert "ImportError" in only.detail


def test_a_program_that_dies_after_checks_that_passed_has_failed() -> None:
    assert [one.ok for one in judged("llm", [outcome()], -9, "killed")] == [True, False]
    assert [one.ok for one in judged("llm", [outcome(), outcome(ok=False)], 1, "")] == [True, False]
    assert [one.ok for one in judged("llm", [outcome()], 0, "")] == [True]


def test_the_table_names_what_failed() -> None:
    told = table([outcome(), outcome(check="tools", ok=False)], {"llm": "llm==1"})
    assert told.splitlines()[1].split() == ["llm", "llm==1", "1", "of", "2", "tools"]


def test_a_missing_tool_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (client,) = chosen(["openai-node"])
    with pytest.raises(NoEnvironment, match="npm is not installed"):
        Environments(tmp_path).prepare(client)


def test_a_program_tells_each_check_and_exits_by_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from tests.clients.reporting import Checks, same\n"
        "checks = Checks('sample')\n"
        "@checks.add\n"
        "def good_one(): return 'seen'\n"
        "@checks.add\n"
        "def bad_one(): same(1, 2, 'the number')\n"
        "checks.run()\n"
    )

    def ran(*names: str) -> tuple[list[Outcome | None], int]:
        done = subprocess.run(
            [sys.executable, str(program), *names],
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return [read_outcome(line) for line in done.stdout.splitlines()], done.returncode

    outcomes, exit_code = ran()
    assert [(one.check, one.ok) for one in outcomes if one is not None] == [("good-one", True), ("bad-one", False)]
    assert outcomes[1] is not None
    assert "the number is 1, not 2" in outcomes[1].detail
    assert exit_code == 1
    assert ran("good-one")[1] == 0
    assert ran("no-such-one") == ([], 1)


def test_nothing_here_is_collected_as_a_test() -> None:
    assert list(CLIENTS_FOLDER.rglob("test_*.py")) == []
