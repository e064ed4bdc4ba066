"""What another gateway needs to go on with a stream, as the scheduler keeps it: values, nothing that runs. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molink_common.errors import ProtocolError
from molink_gateway.answer_style import AnswerStyle
from molink_gateway.replies import ChatReply, CompletionReply, Reply, ReplyHead


class StreamKind(StrEnum):
    """Which endpoint answers."""

    CHAT = "chat"
    COMPLETION = "completion"


class ResumeState(BaseModel):
    """How a stream with one choice is told; its prompt and its options are in its `SubmitSequence`."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    version: Literal[1] = 1
    kind: StreamKind
    id: Annotated[str, Field(min_length=1, max_length=64)]
    created: Annotated[int, Field(ge=0)]
    model: str
    """As the client has called it."""
    fingerprint: str
    """Of the model, as the answer shows it."""
    style: AnswerStyle = AnswerStyle()
    echo: str = ""
    """The prompt's text, if it is to stand before the answer."""
    has_usage: bool = False
    has_continuous_usage: bool = False
    tells_tokens: bool = False

    def encode(self) -> str:
        """As JSON."""
        return orjson.dumps(self.model_dump(mode="json")).decode()

    def reply(self, prompt: tuple[int, ...]) -> Reply:
        """The reply that the first gateway has made."""
        head = ReplyHead(id=self.id, created=self.created, model=self.model, fingerprint=self.fingerprint)
        match self.kind:
            case StreamKind.CHAT:
                return ChatReply(
                    head,
                    told_prompt=prompt if self.tells_tokens else None,
                    has_short_call_ids=self.style.calls is not None and self.style.calls.has_short_ids,
                )
            case StreamKind.COMPLETION:
                return CompletionReply(head, [self.echo], told_prompts=[prompt] if self.tells_tokens else None)


def decode_resume_state(text: str) -> ResumeState:
    """The inverse of `ResumeState.encode`.

    Raises:
        ProtocolError: it does not parse, or is of a version that this gateway does not know.
    """
    try:
        return ResumeState.model_validate(orjson.loads(text))
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise ProtocolError(f"the state of a stream does not parse: {error}") from error
