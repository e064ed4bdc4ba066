"""What an answer must look like: the grammar that it follows and the calls of tools that it may hold.

Pure, but a grammar may take half a second to check: for a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from molink_gateway.answer_style import ExpectedCalls
from molink_gateway.api_errors import ApiError, bad_request
from molink_gateway.call_formats import MARKERS, CallFormat
from molink_gateway.generation_fields import GenerationFields
from molink_gateway.grammar import GUIDED_FIELDS, grammar_of
from molink_gateway.tool_grammar import calls_in_text, calls_or_answer, required_calls
from molink_gateway.tools import ToolPlan


class Writer(Protocol):
    """What must be known of the model."""

    @property
    def call_format(self) -> CallFormat | None:
        """How it writes calls, if its chat template says so."""

    def has_token(self, text: str) -> bool:
        """Whether its vocabulary has a token of this very text."""

    def unwritable(self, text: str) -> str | None:
        """The first character of a text that no tokens of its vocabulary make up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """Of all choices of a request."""

    grammar: str | None = None
    calls: ExpectedCalls | None = None


def asks_for_form(request: GenerationFields) -> bool:
    """Whether there is anything to compile."""
    structured = request.structured_outputs is not None
    return structured or request.response_format is not None or any(_guided(request))


def form_of(request: GenerationFields, plan: ToolPlan | None, writer: Writer) -> AnswerForm:
    """The form that `request` asks for. Takes up to half a second where it asks for one.

    Raises:
        ApiError: 400, a schema or a grammar cannot be followed.
    """
    if plan is not None and plan.is_required:
        return AnswerForm(grammar=required_calls(plan), calls=_expected(plan, CallFormat.BARE, writer))
    grammar = _grammar(request)
    _check_choices(request, writer)
    if plan is None:
        return AnswerForm(grammar=grammar)
    form = writer.call_format or CallFormat.HERMES
    calls = _expected(plan, form, writer)
    if grammar is not None:
        return AnswerForm(grammar=calls_or_answer(plan, form, grammar), calls=calls)
    # only as text: a model with a token of its own for the marker is not held back from using it
    marked_in_text = form is CallFormat.HERMES and not any(map(writer.has_token, MARKERS[form].tokens))
    if marked_in_text and any(one.strict for one in plan.functions):
        return AnswerForm(grammar=calls_in_text(plan), calls=calls)
    return AnswerForm(calls=calls)


def _expected(plan: ToolPlan, form: CallFormat, writer: Writer) -> ExpectedCalls:
    return ExpectedCalls(
        form=form,
        functions=plan.names,
        is_parallel=plan.is_parallel,
        has_short_ids=writer.call_format is CallFormat.MISTRAL,
    )


def _check_choices(request: GenerationFields, writer: Writer) -> None:
    """A grammar that asks for what the model cannot write would fail in the middle of the answer."""
    structured = request.structured_outputs
    within = structured.get("choice") if isinstance(structured, dict) else None
    for field, choices in (("structured_outputs.choice", within), ("guided_choice", request.guided_choice)):
        for choice in choices or ():
            character = writer.unwritable(choice)
            if character is not None:
                raise bad_request(
                    f"`{field}` holds the character {character!a}, for which this model has no tokens.", param=field
                )


def _guided(request: GenerationFields) -> dict[str, Any]:
    """VLLM's older fields, by name."""
    values = {field: getattr(request, field) for field in GUIDED_FIELDS}
    return {field: value for field, value in values.items() if value is not None}


def _grammar(request: GenerationFields) -> str | None:
    guided = _guided(request)
    if not guided:
        return grammar_of(request.response_format, request.structured_outputs)
    first, *others = guided
    if others or request.structured_outputs is not None:
        other = others[0] if others else "structured_outputs"
        raise bad_request(f"`{first}` and `{other}` both ask for a form of the answer. Leave one out.", param=other)
    inner = f"structured_outputs.{GUIDED_FIELDS[first]}"
    try:
        return grammar_of(request.response_format, {GUIDED_FIELDS[first]: guided[first]})
    except ApiError as error:
        if error.param not in (inner, "structured_outputs"):
            raise
        message = error.message.replace(inner, first).replace("structured_outputs", first)
        raise bad_request(message, param=first, code=error.code) from error
