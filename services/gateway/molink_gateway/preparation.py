"""What is needed to run and answer a request, whatever its kind: options, sequences, choices, the reply's shape."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from molink_common.identity import SequenceId, new_sequence_id
from molink_common.messages import SubmitSequence
from molink_common.sampling import SamplingOptions
from molink_gateway.answer_style import AnswerStyle, ExpectedCalls
from molink_gateway.api_errors import too_long
from molink_gateway.call_formats import MARKERS
from molink_gateway.choice import Choice
from molink_gateway.cluster import ServedModel
from molink_gateway.generation_fields import GenerationFields
from molink_gateway.options import sampling_options
from molink_gateway.prompt_logprobs import PromptInbox
from molink_gateway.replies import Reply, ReplyHead
from molink_gateway.resume_state import ResumeState, StreamKind
from molink_gateway.scripts import ChunkScript, Script
from molink_gateway.sequences import Submission
from molink_gateway.stop_strings import StopStrings
from molink_gateway.stream_place import Place
from molink_gateway.tokenizer import Tokenizer
from molink_gateway.tool_calls import CallReader

if TYPE_CHECKING:
    from molink_gateway.run import Run

LONG_TEXT_CHARACTERS = 8192
"""Longer texts are tokenized in a thread, so that other streams go on meanwhile."""

Order = tuple[list[int], SamplingOptions]
"""A prompt's tokens and how to go on from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a request comes from."""

    request_id: str
    gateway: str
    trace: str | None
    wants_resuming: bool
    tenant: str = ""
    """The id of the API key that the request came with."""


async def _nothing_to_do() -> None:
    return


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request that is ready to be submitted."""

    submission: Submission
    choices: tuple[Choice, ...]
    reply: Reply
    num_prompt_tokens: int
    is_stream: bool
    has_usage: bool
    has_continuous_usage: bool
    num_choices: int = 1
    """Of each prompt, one behind the other."""
    drops_answer: bool = False
    """Only the prompt is told."""
    prompts: tuple[PromptInbox, ...] = ()
    """For each choice, where the log probabilities of its prompt arrive before it may say anything; or none at all."""
    told: Place | None = None
    """What the client has already of a stream that is taken up again."""
    make_script: Callable[[Prepared, Run], Script] = ChunkScript
    """How a stream of it is told."""
    before_end: Callable[[], Awaitable[None]] = _nothing_to_do
    """What must be done before the client reads the end of the answer."""

    @property
    def stream(self) -> SequenceId | None:
        """The sequence whose places are the stream's; None: there are several."""
        return self.submission.ids[0] if len(self.choices) == 1 else None

    @property
    def is_resumable(self) -> bool:
        """Whether a client that was cut off can have the rest."""
        return self.submission.sequences[0].resume_state is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a request is answered."""

    kind: StreamKind
    head: ReplyHead
    reply: Reply
    style: AnswerStyle
    echo: str = ""
    """The prompt's text, if it is to stand before the answer."""


async def encode_text(model: ServedModel, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
    """The text's tokens.

    Raises:
        ApiError: 400, there are more of them than the model can take.
    """
    fewest = model.tokenizer.fewest_tokens(text)
    if fewest >= model.card.context_length:  # a text of megabytes is refused without the seconds of encoding it
        raise too_long(fewest, model.card.context_length, param=field, is_at_least=True)
    tokenizer: Tokenizer = model.tokenizer
    if len(text) < LONG_TEXT_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def make_options(
    request: GenerationFields,
    model: ServedModel,
    prompt: list[int],
    *,
    default_tokens: int | None,
    prompt_field: str,
    grammar: str | None,
) -> list[SamplingOptions]:
    """See `sampling_options`, of which this knows the model's part."""
    return sampling_options(
        request,
        num_prompt_tokens=len(prompt),
        context_length=model.card.context_length,
        vocabulary_size=model.card.vocabulary_size,
        seed=secrets.randbits(63),
        default_tokens=default_tokens,
        prompt_field=prompt_field,
        grammar=grammar,
    )


def make_head(prefix: str, request: GenerationFields, model: ServedModel) -> ReplyHead:
    """Of a new answer."""
    return ReplyHead(
        id=prefix + secrets.token_hex(12),
        created=int(time.time()),
        model=request.model,
        fingerprint=fingerprint_of(model),
    )


def style_of(request: GenerationFields, calls: ExpectedCalls | None = None) -> AnswerStyle:
    """How the answer is read out of its tokens."""
    return AnswerStyle(
        stop=tuple(request.stop),
        keeps_stop=bool(request.include_stop_str_in_output),
        shows_special=request.skip_special_tokens is False,
        calls=calls,
    )


def _state(shape: Shape, request: GenerationFields, origin: Origin, orders: Sequence[Order]) -> ResumeState | None:
    """None for what cannot be taken up again: the scheduler keeps tokens, not their log probabilities."""
    if not (origin.wants_resuming and request.stream and len(orders) == 1 and request.likeliest is None):
        return None
    if request.likeliest_of_prompt is not None or request.max_tokens == 0:
        return None
    head = shape.head
    return ResumeState(
        kind=shape.kind,
        id=head.id,
        created=head.created,
        model=head.model,
        fingerprint=head.fingerprint,
        style=shape.style,
        echo=shape.echo,
        has_usage=request.wants_usage,
        has_continuous_usage=request.wants_continuous_usage,
        tells_tokens=bool(request.return_token_ids),
    )


def make_choice(model: ServedModel, prompt: Sequence[int], style: AnswerStyle, options: SamplingOptions) -> Choice:
    """An answer that has not begun."""
    calls, ends = style.calls, frozenset(model.card.eos_token_ids)
    if not style.keeps_stop:
        ends = ends.union(options.stop_token_ids)
    elif style.shows_special:
        ends = frozenset()
    return Choice(
        model.tokenizer.detokenizer(
            prompt[-16:],
            shows_special=style.shows_special,
            shown=() if calls is None else MARKERS[calls.form].tokens,
        ),
        StopStrings(style.stop, keeps_stop=style.keeps_stop),
        text_of=model.tokenizer.text_of,
        eos_token_ids=ends,
        has_logprobs=options.top_logprobs is not None,
        calls=None if calls is None else CallReader(calls.form, calls.functions, is_parallel=calls.is_parallel),
    )


def make_prepared(
    request: GenerationFields,
    model: ServedModel,
    orders: Sequence[Order],
    num_prompt_tokens: int,
    origin: Origin,
    shape: Shape,
) -> Prepared:
    """The request as sequences, and the answers that they grow into."""
    state = _state(shape, request, origin, orders)
    submission = Submission(
        sequences=tuple(
            SubmitSequence(
                sequence=new_sequence_id(),
                gateway=origin.gateway,
                request=origin.request_id,
                choice=choice,
                model=model.card.name,
                prompt=tuple(prompt),
                options=options,
                tenant=origin.tenant,
                priority=request.priority or 0,
                trace=origin.trace,
                resume_state=None if state is None else state.encode(),
            )
            for choice, (prompt, options) in enumerate(orders)
        )
    )
    return Prepared(
        submission=submission,
        choices=tuple(make_choice(model, prompt, shape.style, options) for prompt, options in orders),
        reply=shape.reply,
        num_choices=request.num_choices,
        num_prompt_tokens=num_prompt_tokens,
        is_stream=bool(request.stream),
        has_usage=request.wants_usage,
        has_continuous_usage=request.wants_continuous_usage,
        drops_answer=request.max_tokens == 0,
    )


def fingerprint_of(model: ServedModel) -> str:
    """As answers show it."""
    return "fp_" + model.card.fingerprint[:16]
