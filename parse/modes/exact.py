"""Mode exact: a draft changes the speed, but not the output.

A draft token is accepted only if the target chooses the same token.
"""

from parse.modes.draft import draft_whole
from parse.modes.run import Run, generate


async def run(run: Run) -> None:
    draft = await draft_whole(run)
    await generate(run, draft.token_ids)
    if draft.token_ids:
        run.state.accepted_prefix_length = run.state.accepted_tokens
