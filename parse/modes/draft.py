"""Receives a draft, from the drafter or from the client's prediction.

If there is no draft, the target generates the whole answer, which takes longer. Drafting one request while another one
is verified needs no code here: each answer is a task of its own (`deployments/api/handlers.py`).
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from parse.detokenizer import IncrementalDetokenizer
from parse.errors import DraftUnavailable, RequestError
from parse.events import Fallback
from parse.modes.run import DraftWindow, Run, prefill, prefill_draft
from parse.requests import DraftRequest
from parse.types import NO_STREAMING, validate_token_ids

logger = logging.getLogger(__name__)


class Draft:
    """A draft, which grows while it is written."""

    def __init__(self, output_before: Sequence[int]) -> None:
        self.output_before = tuple(output_before)
        self.token_ids: list[int] = []
        self.final_text: str | None = None
        """The text of the whole answer if the draft ends at a stop string, which may cut the text of a token."""
        self.complete = False
        """Whether the draft is a complete answer.

        It is one if it ended with an end token or a stop string, or if it is a whole prediction of the client. With
        `ignore_eos`, only a stop string completes it."""
        self.closed = False
        """Whether no more tokens will follow."""
        self._changed = asyncio.Event()

    def extend(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids
        self._changed.set()

    def close(self) -> None:
        self.closed = True
        self._changed.set()

    async def wait_for(self, length: int) -> None:
        """Returns when the draft has that many tokens or is closed."""
        while not self.closed and len(self.token_ids) < length:
            self._changed.clear()
            await self._changed.wait()


async def draft_whole(run: Run) -> Draft:
    """Receives a whole draft while the target prefills the prompt and, where this pays, the draft."""
    draft = Draft(run.state.output)
    prefilling = asyncio.create_task(_prefill_all(run, draft))
    try:
        await receive(run, draft, stream_interval=run.prefill_interval or NO_STREAMING)
        if run.prefill_interval is None:
            await prefilling
    finally:
        prefilling.cancel()
        await asyncio.gather(prefilling, return_exceptions=True)
    run.state.record_draft(len(draft.token_ids))
    return draft


async def _prefill_all(run: Run, draft: Draft) -> None:
    """Prefills the prompt, and then the draft each time that it has grown by another block."""
    await prefill(run)
    if run.prefill_interval is None:
        return
    length = run.prefill_interval
    while True:
        await draft.wait_for(length)
        if draft.closed:
            return
        await prefill_draft(run, draft.token_ids)
        length = len(draft.token_ids) + run.prefill_interval


def whole_window(run: Run, draft: Draft) -> DraftWindow:
    """Returns the window that covers a whole draft."""
    return DraftWindow(
        token_ids=draft.token_ids,
        prefix_lengths=run.prefix_lengths(draft.token_ids, complete=draft.complete),
        complete=draft.complete,
        final_text=draft.final_text,
    )


async def receive(run: Run, draft: Draft, *, stream_interval: int) -> None:
    """Receives the draft and closes it.

    A failure is recorded as the reason for the fallback, and not raised.
    """
    with run.state.stage("draft"):
        try:
            await _receive(run, draft, stream_interval)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # The caller did not cancel this task, so the call to the drafter was cancelled.
            run.state.fallback = Fallback("lost", "the call to the drafter was cancelled")
        except DraftUnavailable as error:
            run.state.fallback = Fallback(error.cause, f"no draft: {error}")
        except RequestError as error:  # for example a prompt that is too long for the drafter
            run.state.fallback = Fallback("refused", f"no draft: {error}")
        except TimeoutError:
            limit = run.settings.draft_timeout_s
            run.state.fallback = Fallback("slow", f"no draft: the drafter took longer than {limit:g} s")
        except Exception as error:
            logger.warning("the drafter failed; the target answers without a draft", exc_info=True)
            run.state.fallback = Fallback("failed", f"no draft, because the drafter failed: {error}")
    draft.close()


async def _receive(run: Run, draft: Draft, stream_interval: int) -> None:
    request = run.request
    if request.prediction is not None:
        draft.complete = not run.state.output and not run.sampling_params.ignore_eos
        _extend_until_end(run, draft, request.prediction[len(run.state.output) :])
        return
    assert run.drafter is not None
    deltas = run.drafter.draft(
        DraftRequest(
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=tuple(run.state.output),
            messages=request.messages,
            # An end token ends the draft even with `ignore_eos`, where the target then continues.
            sampling_params=replace(run.sampling_params, ignore_eos=False, include_eos_token=False),
            stream_interval=stream_interval,
            session_key=request.session_key,
        )
    )
    async with asyncio.timeout(run.settings.draft_timeout_s), aclosing(deltas):
        async for delta in deltas:
            draft.complete = delta.finish_reason == "stop" and not run.sampling_params.ignore_eos
            if _extend_until_end(run, draft, delta.token_ids):
                break


def _extend_until_end(run: Run, draft: Draft, token_ids: Sequence[int]) -> bool:
    """Adds tokens up to an end token, another special token, a stop string or the token limit.

    Returns whether one of these was reached. Only a stop string, a stop token and, without `ignore_eos`, an end token
    of the target complete the draft. Another special token and the token limit make it incomplete. If none of these is
    reached, `draft.complete` does not change, so a whole prediction stays complete.
    """
    token_ids, ended = validate_token_ids("draft", token_ids, len(run.tokenizer)), False
    params, stop_token_ids = run.sampling_params, frozenset(run.sampling_params.stop_token_ids)
    special = run.eos_token_ids.union(run.tokenizer.all_special_ids, stop_token_ids)
    end = next((index for index, token in enumerate(token_ids) if token in special), None)
    if end is not None:
        draft.complete = token_ids[end] in params.end_token_ids(run.eos_token_ids)
        is_included = params.include_stop_str_in_output and token_ids[end] in stop_token_ids
        token_ids, ended = token_ids[: end + is_included], True
    output = [*draft.output_before, *draft.token_ids]
    if params.stop:
        detokenizer = IncrementalDetokenizer.for_params(run.tokenizer, params)
        text = detokenizer.add([*output, *token_ids]) + detokenizer.finish()
        if detokenizer.matched_stop is not None:
            draft.complete = ended = True
            draft.final_text = text
            while token_ids and len(run.decode([*output, *token_ids])) > len(text):
                token_ids = token_ids[:-1]
    if run.sampling_params.max_tokens is not None:
        max_tokens = max(0, run.sampling_params.max_tokens - len(output))
        if len(token_ids) > max_tokens:
            token_ids, ended, draft.complete, draft.final_text = token_ids[:max_tokens], True, False, None
    if len(output) + len(token_ids) < params.min_tokens:
        draft.complete = False  # the target continues it
    draft.extend(token_ids)
    return ended
