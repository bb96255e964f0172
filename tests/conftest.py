import os

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from training.tokenizer import build

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build()
