"""From a valid chat request to what is needed to run and answer it."""

from __future__ import annotations

import asyncio
from typing import Any

from molink_gateway.answer_form import AnswerForm, asks_for_form, form_of
from molink_gateway.cluster import ServedModel
from molink_gateway.preparation import (
    Origin,
    Prepared,
    Shape,
    encode_text,
    make_head,
    make_options,
    make_prepared,
    style_of,
)
from molink_gateway.prompt_reply import with_prompts
from molink_gateway.replies import ChatReply
from molink_gateway.requests import ChatRequest
from molink_gateway.resume_state import StreamKind
from molink_gateway.tokenizer import Tokenizer
from molink_gateway.tool_prompt import with_tools_in_words
from molink_gateway.tools import Function, ToolPlan


async def prepare_chat(request: ChatRequest, model: ServedModel, origin: Origin) -> Prepared:
    """Render and tokenize a chat.

    Raises:
        ApiError: 400, when it does not fit the template, the context or the vocabulary, or asks for a form of the
            answer that there is none of.
    """
    plan = request.tool_plan()
    tokenizer: Tokenizer = model.tokenizer
    text = render_chat(request, plan, tokenizer)
    prompt = await encode_text(model, text, add_special_tokens=False, field="messages")
    form = AnswerForm()
    if plan is not None or asks_for_form(request):
        form = await asyncio.to_thread(form_of, request, plan, tokenizer)
    options = make_options(request, model, prompt, default_tokens=None, prompt_field="messages", grammar=form.grammar)
    head = make_head("chatcmpl-", request, model)
    reply = ChatReply(
        head,
        told_prompt=prompt if request.return_token_ids else None,
        has_short_call_ids=form.calls is not None and form.calls.has_short_ids,
    )
    shape = Shape(kind=StreamKind.CHAT, head=head, reply=reply, style=style_of(request, form.calls))
    prepared = make_prepared(request, model, [(prompt, one) for one in options], len(prompt), origin, shape)
    return with_prompts(prepared, request, head, tokenizer.text_of, echoes=None)


def render_chat(request: ChatRequest, plan: ToolPlan | None, tokenizer: Tokenizer) -> str:
    """The chat as one prompt.

    Raises:
        ApiError: 400, the model's chat template refuses it.
    """
    turns, tools = request.turns(), None
    if tokenizer.call_format is None:
        turns = with_tools_in_words(turns, plan)
    elif plan is not None:
        tools = [_as_templates_read(function) for function in plan.functions]
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    continues = bool(request.continue_final_message)
    begins = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    return tokenizer.render(
        turns, tools=tools, add_generation_prompt=begins, continue_final_message=continues, variables=variables
    )


def _as_templates_read(function: Function) -> dict[str, Any]:
    described = {
        "name": function.name,
        "description": function.description or "",
        "parameters": function.parameters,
    }
    return {"type": "function", "function": described}
