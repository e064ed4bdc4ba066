"""From a valid request to what is needed to run and answer it: prompts, options, choices, the reply's shape."""

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
from molink_gateway.api_errors import bad_request, too_long
from molink_gateway.choice import Choice
from molink_gateway.cluster import ServedModel
from molink_gateway.options import COMPLETION_TOKENS, check_vocabulary, sampling_options
from molink_gateway.prompt_logprobs import PromptInbox, offsets_in_ids, offsets_in_text
from molink_gateway.prompt_reply import Echo, with_prompts
from molink_gateway.replies import ChatReply, CompletionReply, Reply, ReplyHead
from molink_gateway.request_fields import MAX_PROMPTS
from molink_gateway.requests import ChatRequest, CompletionRequest, GenerationFields
from molink_gateway.resume_state import ResumeState, StreamKind
from molink_gateway.scripts import ChunkScript, Script
from molink_gateway.sequences import Submission
from molink_gateway.stop_strings import StopStrings
from molink_gateway.stream_place import Place
from molink_gateway.tokenizer import Tokenizer

if TYPE_CHECKING:
    from molink_gateway.run import Run

_LONG_TEXT_CHARACTERS = 8192
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


async def prepare_chat(request: ChatRequest, model: ServedModel, origin: Origin) -> Prepared:
    """Render and tokenize a chat.

    Raises:
        ApiError: 400, when it does not fit the template, the context or the vocabulary.
    """
    text = model.tokenizer.render(request.turns())
    prompt = await _encode(model, text, add_special_tokens=False, field="messages")
    options = _options(request, model, prompt, default_tokens=None, prompt_field="messages")
    head = _head("chatcmpl-", request, model)
    reply = ChatReply(head, told_prompt=prompt if request.return_token_ids else None)
    orders = [(prompt, one) for one in options]
    state = _state(StreamKind.CHAT, head, request, origin, orders)
    prepared = _prepared(request, model, orders, reply, len(prompt), origin, state)
    return with_prompts(prepared, request, head, model.tokenizer.text_of, echoes=None)


async def prepare_completion(request: CompletionRequest, model: ServedModel, origin: Origin) -> Prepared:
    """Tokenize the prompts of a completion.

    Raises:
        ApiError: 400, when a prompt is empty or does not fit the context or the vocabulary.
    """
    if len(request.prompt) * request.num_choices > MAX_PROMPTS:
        raise bad_request(
            f"`prompt` has {len(request.prompt)} prompts with {request.num_choices} answers each; a request may have "
            f"at most {MAX_PROMPTS} answers.",
            param="prompt",
        )
    orders: list[Order] = []
    echoes: list[str] = []
    echoes_told: list[Echo | None] = []
    num_prompt_tokens = 0
    for given in request.prompt:
        if isinstance(given, str):
            prompt = await _encode(model, given, add_special_tokens=True, field="prompt")
        else:
            prompt = given
            check_vocabulary(prompt, model.card.vocabulary_size, "prompt")
        if not prompt:
            raise bad_request("`prompt` is empty; it must hold at least one token.", param="prompt")
        options = _options(request, model, prompt, default_tokens=COMPLETION_TOKENS, prompt_field="prompt")
        orders += [(prompt, one) for one in options]
        echo = "" if not request.echo else given if isinstance(given, str) else model.tokenizer.decode(prompt)
        echoes += [echo] * len(options)
        echoes_told += [await _echo_told(request, model.tokenizer, given, prompt, echo)] * len(options)
        num_prompt_tokens += len(prompt)
    told_prompts = [prompt for prompt, _ in orders] if request.return_token_ids else None
    head = _head("cmpl-", request, model)
    reply = CompletionReply(head, echoes, told_prompts=told_prompts)
    state = _state(StreamKind.COMPLETION, head, request, origin, orders, echo=echoes[0])
    prepared = _prepared(request, model, orders, reply, num_prompt_tokens, origin, state)
    return with_prompts(prepared, request, head, model.tokenizer.text_of, echoes=echoes_told)


async def _echo_told(
    request: CompletionRequest, tokenizer: Tokenizer, given: str | list[int], prompt: list[int], text: str
) -> Echo | None:
    """The prompt that stands before the answer, if its log probabilities are told as well."""
    if not request.echo or request.logprobs is None:
        return None

    def offsets() -> list[int]:
        if isinstance(given, str):
            return offsets_in_text(tokenizer.spans(given, add_special_tokens=True))
        return offsets_in_ids(tokenizer.detokenizer(()), prompt, len(text))

    is_long = len(text) >= _LONG_TEXT_CHARACTERS
    return Echo(
        text=text, offsets=await asyncio.to_thread(offsets) if is_long else offsets(), likeliest=request.logprobs
    )


async def _encode(model: ServedModel, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
    fewest = model.tokenizer.fewest_tokens(text)
    if fewest >= model.card.context_length:  # a text of megabytes is refused without the seconds of encoding it
        raise too_long(fewest, model.card.context_length, param=field, is_at_least=True)
    tokenizer: Tokenizer = model.tokenizer
    if len(text) < _LONG_TEXT_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _options(
    request: GenerationFields, model: ServedModel, prompt: list[int], *, default_tokens: int | None, prompt_field: str
) -> list[SamplingOptions]:
    return sampling_options(
        request,
        num_prompt_tokens=len(prompt),
        context_length=model.card.context_length,
        vocabulary_size=model.card.vocabulary_size,
        seed=secrets.randbits(63),
        default_tokens=default_tokens,
        prompt_field=prompt_field,
    )


def _head(prefix: str, request: GenerationFields, model: ServedModel) -> ReplyHead:
    return ReplyHead(
        id=prefix + secrets.token_hex(12),
        created=int(time.time()),
        model=request.model,
        fingerprint=fingerprint_of(model),
    )


def _state(
    kind: StreamKind,
    head: ReplyHead,
    request: GenerationFields,
    origin: Origin,
    orders: Sequence[Order],
    *,
    echo: str = "",
) -> ResumeState | None:
    """None for what cannot be taken up again: the scheduler keeps tokens, not their log probabilities."""
    if not (origin.wants_resuming and request.stream and len(orders) == 1 and request.likeliest is None):
        return None
    if request.likeliest_of_prompt is not None or request.max_tokens == 0:
        return None
    return ResumeState(
        kind=kind,
        id=head.id,
        created=head.created,
        model=head.model,
        fingerprint=head.fingerprint,
        stop=tuple(request.stop),
        echo=echo,
        has_usage=request.wants_usage,
        has_continuous_usage=request.wants_continuous_usage,
        tells_tokens=bool(request.return_token_ids),
    )


def make_choice(model: ServedModel, prompt: Sequence[int], stop: Sequence[str], options: SamplingOptions) -> Choice:
    """An answer that has not begun."""
    return Choice(
        model.tokenizer.detokenizer(prompt[-16:]),
        StopStrings(stop),
        text_of=model.tokenizer.text_of,
        eos_token_ids=frozenset(model.card.eos_token_ids),
        has_logprobs=options.top_logprobs is not None,
    )


def _prepared(
    request: GenerationFields,
    model: ServedModel,
    orders: Sequence[Order],
    reply: Reply,
    num_prompt_tokens: int,
    origin: Origin,
    state: ResumeState | None,
) -> Prepared:
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
                trace=origin.trace,
                resume_state=None if state is None else state.encode(),
            )
            for choice, (prompt, options) in enumerate(orders)
        )
    )
    return Prepared(
        submission=submission,
        choices=tuple(make_choice(model, prompt, request.stop, options) for prompt, options in orders),
        reply=reply,
        num_prompt_tokens=num_prompt_tokens,
        is_stream=bool(request.stream),
        has_usage=request.wants_usage,
        has_continuous_usage=request.wants_continuous_usage,
        drops_answer=request.max_tokens == 0,
    )


def fingerprint_of(model: ServedModel) -> str:
    """As answers show it."""
    return "fp_" + model.card.fingerprint[:16]
