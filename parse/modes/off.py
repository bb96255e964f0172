"""Mode off: the target alone."""

from parse.modes.run import Run, generate


async def run(run: Run) -> None:
    await generate(run)
