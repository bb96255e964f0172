import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Operations as small as these only wait for one another on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
