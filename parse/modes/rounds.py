"""Mode rounds: the drafter continues after a correction by the target.

A further draft is requested if the draft was longer than its accepted prefix and the correction together. This depends
on the request alone, so the same request gets the same answer whatever other requests there are.
"""

from parse.modes.draft import draft_whole, whole_window
from parse.modes.run import Run, generate, verify_and_generate


async def run(run: Run) -> None:
    state, settings = run.state, run.settings
    while state.rounds < settings.max_rounds:
        draft = await draft_whole(run)
        if not draft.token_ids:
            break
        # The length of the draft is the best estimate of the number of missing answer tokens.
        missing = len(draft.token_ids) - settings.correction_tokens
        may_continue = state.rounds < settings.max_rounds and missing > 0
        accepted = await verify_and_generate(
            run,
            whole_window(run, draft),
            max_continuation_tokens=settings.correction_tokens if may_continue else None,
        )
        if state.accepted_prefix_length is None:
            state.accepted_prefix_length = accepted
        if state.finish_reason is not None or missing <= accepted:
            break
    if state.finish_reason is None:
        await generate(run)
