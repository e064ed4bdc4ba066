"""The whole system, started as a user starts it, asked by the client that users have."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from molink.embedded import free_port
from molink.folders import locks_folder
from molink.lock import lock_file
from molink_common.folders import cache_folder
from tests.e2e.conftest import READY_TIMEOUT_S
from tests.e2e.running_system import RunningSystem, start_system, survivors

QUESTION = "Name the capital of France."


@pytest.fixture
def client(running_system: RunningSystem) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running_system.url}/v1", api_key="none", max_retries=0, timeout=60)


def run_molink(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "molink", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_the_first_answer_names_paris(running_system: RunningSystem) -> None:
    after_question = running_system.printed.partition(QUESTION)[2]
    assert "Paris" in after_question
    assert f"curl {running_system.url}/v1/chat/completions" in after_question


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 1


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    whole = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
    )
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole.choices[0].message.content


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="1, 2, 3, 4,", temperature=0, max_tokens=6)
    assert "5" in answer.choices[0].text


def test_models_under_both_names(client: openai.OpenAI) -> None:
    assert {"demo", "SmolLM2-135M-Instruct"} <= {model.id for model in client.models.list()}


def test_an_unknown_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])


def test_health(running_system: RunningSystem) -> None:
    assert httpx.get(f"{running_system.url}/ready", timeout=10).status_code == 200


def test_status_shows_two_stages(running_system: RunningSystem) -> None:
    done = run_molink("status", "--gateway", running_system.url, "--json")
    state = json.loads(done.stdout)
    (pipeline,) = state["pipelines"]
    assert state["ready"]
    assert len(pipeline["stages"]) == 2
    (first, cut), (same_cut, last) = pipeline["layers"]
    assert (first, last) == (0, 30)
    assert cut == same_cut
    shown = run_molink("status", "--gateway", running_system.url)
    assert "layer map" in shown.stdout
    assert shown.returncode == 0


def test_a_terminal_chat(running_system: RunningSystem) -> None:
    done = run_molink("chat", "--url", f"{running_system.url}/v1", "--temperature", "0", text=f"{QUESTION}\n")
    assert "Paris" in done.stdout
    assert done.returncode == 0


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("molink: ")
    assert all(word in last_line for word in words), last_line
    assert "Traceback" not in done.stderr


def test_a_second_up_on_the_port_is_refused(running_system: RunningSystem) -> None:
    done = run_molink("up", "--port", str(running_system.port))
    assert_one_clear_line(done, running_system.url, f"pid {running_system.process.pid}", "molink down")


def test_a_port_of_another_program_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_clear_line(run_molink("up", "--port", str(port)), f"port {port}", "--port")


def test_a_model_that_does_not_exist_is_refused() -> None:
    port = free_port()
    assert_one_clear_line(run_molink("up", "--port", str(port), "--model", "no-such-model"), "no-such-model")
    assert not lock_file(locks_folder(cache_folder()), port).exists()


def test_too_little_memory_is_refused() -> None:
    done = run_molink("up", "--port", str(free_port()), "--memory", "10MiB")
    assert_one_clear_line(done, "too little memory", "10 MiB")


def test_a_device_that_is_not_there_is_refused() -> None:
    done = run_molink("up", "--port", str(free_port()), "--device", "cuda:77")
    assert_one_clear_line(done, "cuda:77")


def test_a_worker_that_is_killed_comes_back(tmp_path: Path) -> None:
    system = start_system(tmp_path / "up.log", "--workers", "2", "--memory", "1500MiB", "--no-sample")
    try:
        system.wait_until_printed("Ctrl-C stops everything", READY_TIMEOUT_S)
        client = openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0, timeout=90)
        os.kill(worker_of(system).pid, signal.SIGKILL)
        system.wait_until_printed("was killed by signal 9; starting it again", 10)
        system.wait_until(lambda: httpx.get(f"{system.url}/ready", timeout=10).status_code == 503, 30)
        system.wait_until(lambda: httpx.get(f"{system.url}/ready", timeout=10).status_code == 200, 60)
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        children = system.children()
        assert len(children) >= 6  # nats, redis, scheduler, gateway, two workers
        assert system.stop() == 0
    finally:
        system.stop()
    assert survivors(children) == []
    assert not lock_file(locks_folder(cache_folder()), system.port).exists()


def worker_of(system: RunningSystem) -> psutil.Process:
    return next(child for child in system.children() if "molink_stage_worker" in child.cmdline())


def test_nothing_survives_a_kill_in_the_middle_of_starting(tmp_path: Path) -> None:
    system = start_system(tmp_path / "up.log", "--workers", "1")
    try:
        system.wait_until_printed("loading layers", READY_TIMEOUT_S)
        children = system.children()
        system.process.kill()
        system.process.wait()
    finally:
        system.stop()
    assert len(children) >= 5
    assert survivors(children) == []


def test_down_stops_a_system_in_the_middle_of_starting(tmp_path: Path) -> None:
    system = start_system(tmp_path / "up.log", "--workers", "1")
    try:
        system.wait_until_printed("redis", READY_TIMEOUT_S)
        children = system.children()
        done = run_molink("down", "--port", str(system.port))
        assert done.stdout == f"stopped {system.url} (pid {system.process.pid})\n"
        assert system.process.wait(timeout=10) != 0
    finally:
        system.stop()
    assert survivors(children) == []
    assert run_molink("down", "--port", str(system.port)).stdout == f"no molink up is running on port {system.port}\n"
