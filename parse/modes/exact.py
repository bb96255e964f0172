"""Mode exact: the target takes the draft token by token, so the output is its own whatever was drafted."""

from parse.modes.draft import draft_whole
from parse.modes.run import Run, generate


async def run(run: Run) -> None:
    draft = await draft_whole(run)
    await generate(run, draft.token_ids)
    run.state.accepted_prefix_length = run.state.accepted_tokens
