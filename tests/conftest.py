import os

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from deployments.__main__ import set_ray_environment
from training.tokenizer import build_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
set_ray_environment()  # before anybody imports Ray
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()
