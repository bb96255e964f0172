"""Mode progressive: windows of the draft are verified while it is written.

The first rejected window ends the draft. The ends of the windows depend on the draft and not on timing. The same
request therefore gets the same answer. In all modes, other requests are drafted and verified meanwhile: see
`CompletionHandler._generate` in `deployments/api/handlers.py`.
"""

import asyncio
from functools import partial

from parse.modes.draft import Draft, receive
from parse.modes.run import DraftWindow, Run, generate, prefill, verify_and_generate


async def run(run: Run) -> None:
    state = run.state
    draft = Draft(state.output)
    drafting = asyncio.create_task(receive(run, draft, stream_interval=run.stride))
    prefilling = asyncio.create_task(prefill(run))
    accepted, window = 0, run.settings.window
    try:
        while state.finish_reason is None:
            # The token after the window shows that the draft continues.
            await draft.wait_for(accepted + window + 1)
            await prefilling
            is_last = len(draft.token_ids) <= accepted + window
            token_ids = tuple(draft.token_ids[: accepted + window + 1])
            complete = is_last and draft.complete
            lengths = run.prefix_lengths(token_ids, complete=complete)
            prefix_lengths = [length for length in lengths if length > accepted]
            if prefix_lengths:
                accepted = await verify_and_generate(
                    run,
                    DraftWindow(
                        token_ids=token_ids if is_last else token_ids[: prefix_lengths[-1]],
                        prefix_lengths=prefix_lengths,
                        complete=complete,
                        final_text=draft.final_text,
                        num_accepted=accepted,
                    ),
                    generate_after_acceptance=is_last,
                    on_verified=partial(_stop_if_rejected, drafting, prefix_lengths[-1]),
                )
                if accepted < prefix_lengths[-1]:
                    break
            if is_last:
                break
            window *= 2  # a short first window shows text early, and longer ones need fewer passes in total
    finally:
        drafting.cancel()
        prefilling.cancel()
        await asyncio.gather(drafting, prefilling, return_exceptions=True)
        state.record_draft(len(draft.token_ids))
        state.accepted_prefix_length = accepted if draft.token_ids else None
    if state.finish_reason is None:
        await generate(run)


def _stop_if_rejected(drafting: asyncio.Task[None], window_end: int, accepted_prefix_length: int) -> None:
    """Stops drafting after a rejection.

    The rest of the draft is useless, and drafting takes processor time from the target.
    """
    if accepted_prefix_length < window_end:
        drafting.cancel()
