"""The engine of a model in a vLLM server that this process has started."""

import os
from dataclasses import replace

from parse.engines.protocol import EngineStats
from parse.engines.remote.engine import Connection, RemoteEngine
from parse.engines.vllm.server_process import SupervisedServer


class VLLMEngine(RemoteEngine):
    """Sends each call to the server, and starts it again when it ends.

    A call that is lost meanwhile is repeated.
    """

    def __init__(self, connection: Connection, server: SupervisedServer) -> None:
        super().__init__(connection)
        self._server = server

    @property
    def device(self) -> str:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        return f"vllm on GPU {gpus}" if gpus else "vllm on CPU"

    async def read_stats(self) -> EngineStats:
        stats = await super().read_stats()
        return replace(
            stats, num_server_restarts=self._server.num_restarts, server_metrics="".join(self._metrics.values())
        )

    def check_health(self) -> None:
        if self._server.failure is not None:
            raise RuntimeError(self._server.failure)

    def shutdown(self) -> None:
        super().shutdown()
        self._server.close()
