"""Prints the plan of a model on this machine: its kernels, the time of its steps, and how drafts are verified.

    python -m parse.plan models/demo-target

If the model has no plan yet, it is measured. A service that runs the same model with the same number of threads uses
the same plan.
"""

import argparse
import sys
from collections.abc import Sequence

from parse.config import EngineSettings
from parse.engines.native.kernel_selection import TOKEN_COUNTS
from parse.engines.native.plan_store import FilePlanStore, ModelPlan
from parse.engines.native_loader import load_native_engine
from parse.errors import RequestError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a local path or a Hugging Face id")
    parser.add_argument("--num-threads", type=int, help="as in the settings of the model; by default PyTorch's choice")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    settings = EngineSettings(
        model=options.model, num_threads=options.num_threads, dtype=options.dtype, device=options.device
    )
    try:
        engine = load_native_engine(settings)
    except (RequestError, ValueError) as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 1
    try:
        assert engine.model.plan is not None
        print("\n".join(describe_plan(engine.model.plan, engine.capabilities().stride)))
    finally:
        engine.shutdown()
    return 0


def describe_plan(plan: ModelPlan, stride: int | None) -> list[str]:
    """Returns the lines that describe a plan."""
    key = plan.key
    lines = [
        f"processor  {key.processor}",
        f"threads    {key.num_threads}",
        f"dtype      {key.dtype}{f', {key.quantization}' if key.quantization else ''}",
        f"versions   {key.versions}",
    ]
    if isinstance(plan.store, FilePlanStore):
        lines.append(f"file       {plan.store.path(key)}")
    kernels = plan.get_or_create("kernels", dict)
    if kernels:
        lines += ["", f"{'linear layer':16}" + "".join(f"{f'{count} tokens':>12}" for count in TOKEN_COUNTS)]
        lines += [f"{shape:16}" + "".join(f"{name:>12}" for name in names) for shape, names in sorted(kernels.items())]
    lines += ["", f"{'step':16}{'ms':>12}"]
    lines += [f"{f'{size} tokens':16}{seconds * 1e3:>12.2f}" for size, seconds in plan.get_or_create("steps", list)]
    return [*lines, "", f"stride     {stride} tokens between verified prefixes"]


if __name__ == "__main__":
    sys.exit(main())
