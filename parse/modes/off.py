"""Mode off: the target generates the answer without a draft."""

from parse.modes.run import Run, generate


async def run(run: Run) -> None:
    await generate(run)
