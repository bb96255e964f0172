"""The demo pair: the paths of its models and heads, and an example prompt.

In a checkout the models are in the folder `models` beside the package. The wheel has them inside the package.
"""

from pathlib import Path

_IN_WHEEL = Path(__file__).with_name("demo_models")  # setup.py copies the models to this folder
_IN_CHECKOUT = Path(__file__).parents[1] / "models"

DEMO_MODELS = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
DEMO_TARGET, DEMO_DRAFT = str(DEMO_MODELS / "demo-target"), str(DEMO_MODELS / "demo-draft")
DEMO_EAGLE3 = str(DEMO_MODELS / "demo-eagle3")
DEMO_PARALLEL = str(DEMO_MODELS / "demo-parallel")
DEMO_DRAFT_PARALLEL = str(DEMO_MODELS / "demo-draft-parallel")
DEMO_SPACE = str(DEMO_MODELS / "demo-space")

EXAMPLE_PROMPT = (
    "Kim has the record with 27. In turn: first Uma 73, second Max 52, third Jack 74, fourth Quinn 34, fifth Dan 38, "
    "sixth Ben 80, seventh Sam 26. Who has the record now?"
)


def find_demo_model(path: str) -> Path | None:
    """Returns the folder of a demo model from its path in the repository.

    An example of such a path is `models/demo-target`. Configurations contain these paths, but an installed wheel has no
    folder `models`.
    """
    parent, _, name = path.partition("/")
    folder = DEMO_MODELS / name
    return folder if parent == "models" and name.startswith("demo-") and folder.is_dir() else None
