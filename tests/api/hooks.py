"""What schemathesis changes in a request before it sends it; loaded by schemathesis itself, in its own environment.

The document allows any name of a model and answers of any length. Most requests get the name of the model that is
served, because for another one nothing but 404 is to be learned, and answers are short, because their length teaches
nothing either.
"""

from __future__ import annotations

from typing import Any

import schemathesis  # type: ignore[import-not-found]  # it has an environment of its own

SHORT_TOKENS = 6
#: By the end of the address: the field that bounds an answer.
_BOUNDS = {
    "/chat/completions": "max_completion_tokens",
    "/completions": "max_tokens",
    "/responses": "max_output_tokens",
    "/messages": "max_tokens",
}


def shortened(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body of a request as it is sent. What is wrong stays wrong."""
    changed = dict(body)
    model = changed.get("model")
    if isinstance(model, str) and model and len(model) % 8:
        changed["model"] = "demo"
    bound = next((field for end, field in _BOUNDS.items() if path.endswith(end)), None)
    if bound is None:
        return changed
    if path != "/v1/messages" and changed.get(bound) is None:  # there it is required
        changed[bound] = SHORT_TOKENS
    if path == "/v1/completions" and type(changed[bound]) is int and not changed[bound] and not changed.get("echo"):
        changed[bound] = SHORT_TOKENS
    before = changed.get("previous_response_id")
    if isinstance(before, str) and len(before) <= 128 and len(before) % 4:
        del changed["previous_response_id"]
    if isinstance(changed.get("messages"), list):
        changed["messages"] = [_with_content(message) for message in changed["messages"]]
    for field in {bound, "max_tokens"} & changed.keys():
        given = changed[field]
        if isinstance(given, int) and not isinstance(given, bool) and given > SHORT_TOKENS:
            changed[field] = SHORT_TOKENS
    if isinstance(changed.get("n"), int) and changed["n"] > 2:
        changed["n"] = 2 if changed["n"] <= 16 else changed["n"]
    return changed


def _with_content(message: Any) -> Any:
    """That only an assistant may say nothing is more than a schema says."""
    if not isinstance(message, dict) or message.get("role") in (None, "assistant"):
        return message
    return message if message.get("content") is not None else {**message, "content": "Hello"}


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change a request right before it is sent."""
    if isinstance(case.body, dict):
        case.body = shortened(case.operation.path, case.body)
