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
        return f"vllm on GPU {gpus}" if gpus else "vllm"

    async def read_stats(self) -> EngineStats:
        stats = await super().read_stats()
        metrics = "" if stats.servers_failing else "".join(self._metrics.values())
        return replace(stats, num_server_restarts=self._server.num_restarts, server_metrics=metrics)

    def check_health(self) -> None:
        if self._server.failure is not None:
            raise RuntimeError(self._server.failure)

    def shutdown(self) -> None:
        super().shutdown()
        self._server.close()
