import os

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from deployments.__main__ import prepare_ray
from training.tokenizer import build

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
prepare_ray()  # before anybody imports Ray
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build()
