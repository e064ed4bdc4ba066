"""From what the scheduler has kept of a stream to an answer that goes on where the client is."""

from __future__ import annotations

from molink_common.errors import ProtocolError
from molink_common.logs import get_logger
from molink_gateway.api_errors import ApiError
from molink_gateway.cluster import ServedModel
from molink_gateway.preparation import Prepared, fingerprint_of, make_choice
from molink_gateway.resume_state import decode_resume_state
from molink_gateway.scheduler_link import Recovered
from molink_gateway.sequences import Submission
from molink_gateway.stream_place import Place

log = get_logger("gateway.resumption")


def prepare_resumed(recovered: Recovered, told: Place | None, model: ServedModel) -> Prepared:
    """The answer as its first gateway has prepared it; `told` is what the client has of it (None: nothing).

    Raises:
        ApiError: 404, the model is another one by now; 500, what was kept is not for this version.
    """
    request = recovered.request
    try:
        state = decode_resume_state(request.resume_state or "")
    except ProtocolError as error:
        log.error("a stream cannot be taken up", sequence=request.sequence, problem=str(error))
        raise ApiError(500, "This gateway cannot read what another kept of the stream.", code="protocol") from error
    if state.fingerprint != fingerprint_of(model):
        raise ApiError(404, "The pool serves another model by now than the one that began this stream.", code="gone")
    return Prepared(
        submission=Submission(sequences=(request,)),
        choices=(make_choice(model, request.prompt, state.style, request.options),),
        reply=state.reply(request.prompt),
        num_prompt_tokens=len(request.prompt),
        is_stream=True,
        has_usage=state.has_usage,
        has_continuous_usage=state.has_continuous_usage,
        told=told,
    )
