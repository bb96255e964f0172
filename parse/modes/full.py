"""Mode full: the whole draft is verified at once."""

from parse.modes.draft import draft_whole, whole_window
from parse.modes.run import Run, generate, verify_and_generate


async def run(run: Run) -> None:
    draft = await draft_whole(run)
    if not draft.token_ids:
        await generate(run)
        return
    run.state.accepted_prefix_length = await verify_and_generate(run, whole_window(run, draft))
