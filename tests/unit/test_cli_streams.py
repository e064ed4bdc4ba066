"""What the command line reads: the model child's reports and an endpoint's event stream."""

from __future__ import annotations

import orjson
import pytest

from molink.openai_stream import ApiError, Delta, Finished, read_event, response_error
from molink.prepare import Device, Working, read_report
from molink.sample import NO_CHAT_TEMPLATE
from molink_common.errors import ModelError
from molink_common.messages import Dtype, ModelCard

CARD = ModelCard(
    name="tiny",
    fingerprint="f",
    family="llama",
    packed=True,
    num_layers=1,
    hidden_size=8,
    vocabulary_size=16,
    context_length=64,
    checkpoint_dtype="float32",
    layer_parameters=(1,),
    embedding_parameters=1,
    output_parameters=1,
    kv_scalars_per_token=(16,),
)


def test_progress_of_the_model_child() -> None:
    assert read_report('{"doing": "downloading", "share": 0.4}') == Working("downloading", 0.4)
    assert read_report('{"doing": "unpacking", "share": null}') == Working("unpacking", None)
    assert read_report('{"doing": "x", "share": 7}') == Working("x", 1.0)


def test_the_last_line_of_the_model_child() -> None:
    line = orjson.dumps({"card": CARD.model_dump(mode="json"), "folder": "/m"}).decode()
    assert read_report(line) == CARD
    with pytest.raises(ModelError, match="there is no file"):
        read_report('{"error": "there is no file"}')
    with pytest.raises(ModelError, match="cannot be read"):
        read_report('{"card": {"name": "x"}, "folder": "/m"}')


@pytest.mark.parametrize("line", ["", "a warning from a library", "[1]", "{}", '{"half": '])
def test_other_lines_are_no_reports(line: str) -> None:
    assert read_report(line) is None


def event(**choice: object) -> str:
    return "data: " + orjson.dumps({"choices": [choice]}).decode()


def test_pieces_of_an_answer() -> None:
    assert read_event(event(delta={"content": "Par"}, finish_reason=None)) == Delta("Par")
    assert read_event(event(delta={}, finish_reason="stop")) == Finished("stop")


@pytest.mark.parametrize(
    "line", ["", ": keep-alive", "event: x", "data: [DONE]", 'data: {"choices": [], "usage": {}}', "data: 7"]
)
def test_lines_that_add_nothing(line: str) -> None:
    assert read_event(line) is None


def test_an_empty_first_delta_adds_nothing() -> None:
    assert read_event(event(delta={"role": "assistant", "content": ""}, finish_reason=None)) is None


def test_errors_of_the_endpoint_are_told_in_its_words() -> None:
    with pytest.raises(ApiError, match="the pipeline is lost"):
        read_event('data: {"error": {"message": "the pipeline is lost", "type": "server_error"}}')
    with pytest.raises(ApiError, match="not JSON"):
        read_event("data: <html>")
    assert str(response_error(401, b'{"error": {"message": "wrong key"}}')) == "wrong key (HTTP 401)"
    assert str(response_error(502, b"<html>bad")) == "<html>bad (HTTP 502)"
    assert str(response_error(500, b"")) == "no explanation (HTTP 500)"


def test_the_device_that_the_child_names_first() -> None:
    line = '{"device": "cpu", "name": "x", "memory_bytes": 7, "native_dtypes": ["bfloat16", "float32"]}'
    device = read_report(line)
    assert isinstance(device, Device)
    assert device.native_dtypes == (Dtype.BFLOAT16, Dtype.FLOAT32)
    with pytest.raises(ModelError, match="cannot be read"):
        read_report('{"device": "cpu"}')


def test_a_completion_streams_its_text_too() -> None:
    assert read_event('data: {"choices": [{"text": " Paris"}]}') == Delta(" Paris")


def test_the_code_of_an_error_is_kept() -> None:
    body = b'{"error": {"message": "a base model", "code": "no_chat_template"}}'
    assert response_error(400, body).code == NO_CHAT_TEMPLATE
    assert response_error(400, b"[]").code is None
