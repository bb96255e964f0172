import pytest

from parse import EngineSettings
from parse.demo import DEMO_TARGET
from parse.engines.native_loader import load_native_engine


@pytest.fixture(scope="module")
def native():
    engine = load_native_engine(EngineSettings(model=DEMO_TARGET, num_threads=1, kv_cache_memory_bytes=2**28))
    yield engine
    engine.shutdown()
