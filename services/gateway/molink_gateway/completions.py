"""From a valid completion request to what is needed to run and answer it."""

from __future__ import annotations

import asyncio

from molink_gateway.answer_form import AnswerForm, asks_for_form, form_of
from molink_gateway.api_errors import bad_request
from molink_gateway.cluster import ServedModel
from molink_gateway.options import COMPLETION_TOKENS, check_vocabulary
from molink_gateway.preparation import (
    LONG_TEXT_CHARACTERS,
    Order,
    Origin,
    Prepared,
    Shape,
    encode_text,
    make_head,
    make_options,
    make_prepared,
    style_of,
)
from molink_gateway.prompt_logprobs import offsets_in_bytes, offsets_in_ids, offsets_in_text
from molink_gateway.prompt_reply import Echo, with_prompts
from molink_gateway.replies import CompletionReply
from molink_gateway.request_fields import MAX_PROMPTS
from molink_gateway.requests import CompletionRequest
from molink_gateway.resume_state import StreamKind
from molink_gateway.tokenizer import Tokenizer


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
    form = AnswerForm()
    if asks_for_form(request):
        form = await asyncio.to_thread(form_of, request, None, model.tokenizer)
    orders: list[Order] = []
    echoes: list[str] = []
    echoes_told: list[Echo | None] = []
    num_prompt_tokens = 0
    for given in request.prompt:
        if isinstance(given, str):
            prompt = await encode_text(model, given, add_special_tokens=True, field="prompt")
        else:
            prompt = given
            check_vocabulary(prompt, model.card.vocabulary_size, "prompt")
        if not prompt:
            raise bad_request("`prompt` is empty; it must hold at least one token.", param="prompt")
        options = make_options(
            request,
            model,
            prompt,
            default_tokens=COMPLETION_TOKENS,
            prompt_field="prompt",
            grammar=form.grammar,
        )
        orders += [(prompt, one) for one in options]
        echo = "" if not request.echo else given if isinstance(given, str) else model.tokenizer.decode(prompt)
        echoes += [echo] * len(options)
        echoes_told += [await _echo_told(request, model.tokenizer, given, prompt, echo)] * len(options)
        num_prompt_tokens += len(prompt)
    told_prompts = [prompt for prompt, _ in orders] if request.return_token_ids else None
    head = make_head("cmpl-", request, model)
    reply = CompletionReply(head, echoes, told_prompts=told_prompts)
    shape = Shape(kind=StreamKind.COMPLETION, head=head, reply=reply, style=style_of(request), echo=echoes[0])
    prepared = make_prepared(request, model, orders, num_prompt_tokens, origin, shape)
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
        known = offsets_in_bytes([tokenizer.bytes_in_text(token) for token in prompt], text)
        return offsets_in_ids(tokenizer.detokenizer(()), prompt, len(text)) if known is None else known

    is_long = len(text) >= LONG_TEXT_CHARACTERS
    return Echo(
        text=text, offsets=await asyncio.to_thread(offsets) if is_long else offsets(), likeliest=request.logprobs
    )
