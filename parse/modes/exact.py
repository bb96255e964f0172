"""Mode exact: draft tokens are accepted only if the target chooses the same, so the draft changes no output."""

from parse.modes.draft import draft_whole
from parse.modes.run import Run, generate


async def run(run: Run) -> None:
    draft = await draft_whole(run)
    await generate(run, draft.token_ids)
    run.state.accepted_prefix_length = run.state.accepted_tokens
