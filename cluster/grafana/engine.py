"""The engine dashboard: the work of the engine of each replica."""

from cluster.grafana.boards import ENGINE_VARIABLES, ENGINE_VIEW, Board, Row
from cluster.grafana.panels import (
    BAD,
    CAUTION,
    GOOD,
    MUTED,
    NEUTRAL,
    PER_SECOND,
    SHARE,
    TOKENS_PER_SECOND,
    PanelOptions,
    Query,
    bar_gauge_panel,
    stat_panel,
    time_series_panel,
)
from cluster.prometheus import figures
from deployments.observability import metrics

VIEW = ENGINE_VIEW
ROUTER_VIEW = VIEW.without("deployment").without("replica")
BY_REPLICA = ("deployment", "replica")
REPLICA_LEGEND = "{{deployment}} {{replica}}"

NOW = Row(
    "Now",
    [
        stat_panel(
            PanelOptions(
                "Tokens",
                "Tokens that the models compute per second: prompts, drafts, verification suffixes and answers. If the"
                " value falls under the same load, check the batch size and the prefix cache.",
                TOKENS_PER_SECOND,
            ),
            VIEW.rate(metrics.ENGINE_TOKENS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Forward passes",
                "Forward passes per second of all engines. If there are none while calls are running, an engine hangs.",
                PER_SECOND,
            ),
            VIEW.rate(metrics.ENGINE_STEPS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Batch size",
                "Mean number of calls per forward pass. If it is near 1 under load, requests arrive one by one, and the"
                " device is used badly.",
            ),
            figures.batch_size(VIEW),
            base_colour=NEUTRAL,
            decimals=1,
        ),
        stat_panel(
            PanelOptions(
                "Busy",
                "Mean share of their time that engines spend in forward passes. If it is near 100%, add replicas.",
                SHARE,
            ),
            figures.busy_share(VIEW),
            [(0.8, CAUTION), (0.95, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Prefix cache hits",
                "Share of the looked-up tokens that the prefix cache contained. If it is low, the calls of a "
                "conversation reach different replicas, or the KV cache is too small.",
                SHARE,
            ),
            figures.cache_hit_share(VIEW),
            [(0.2, CAUTION), (0.5, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "KV cache usage",
                "Share of the KV cache blocks that running calls use. If it is near 100%, calls wait for memory: raise "
                "kv_cache_memory_bytes or gpu_memory_utilization.",
                SHARE,
            ),
            figures.kv_block_share(VIEW, "used"),
            [(0.8, CAUTION), (0.95, BAD)],
            base_colour=GOOD,
        ),
    ],
)

PASSES = Row(
    "Forward passes",
    [
        time_series_panel(
            PanelOptions(
                "Tokens by replica",
                "Tokens computed per second. If replicas of one deployment differ much, the load is uneven, or a "
                "device is slow.",
                TOKENS_PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_TOKENS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Forward passes by replica",
                "Forward passes per second. If a replica is at zero while calls are running, it hangs. Its health "
                "check fails, and it is replaced.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_STEPS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Batch size by replica",
                "Mean number of calls per forward pass. Larger batches use the device better. If it reaches "
                "max_num_seqs, further calls wait.",
            ),
            Query(figures.batch_size(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Busy by replica",
                "Share of its time that an engine spends in forward passes. At the dashed line, the engine has no "
                "capacity left.",
                SHARE,
            ),
            Query(figures.busy_share(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
            limit=(0.95, BAD),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Running calls",
                "Calls that an engine computes. If the number is far below max_num_seqs while other calls wait, these "
                "wait for memory.",
            ),
            Query(VIEW.gauge(metrics.ENGINE_REQUESTS_RUNNING, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Waiting calls",
                "Calls that wait for an engine. If there are more than a few for minutes, add replicas or memory.",
            ),
            Query(VIEW.gauge(metrics.ENGINE_REQUESTS_WAITING, by=BY_REPLICA), REPLICA_LEGEND),
        ),
    ],
)

MEMORY = Row(
    "Memory and prefix cache",
    [
        time_series_panel(
            PanelOptions(
                "KV cache blocks",
                "Blocks of the KV cache: used by running calls, idle (held only by the prefix cache), and free. If "
                "there are no idle or free blocks, calls wait for memory.",
                "none",
            ),
            Query(VIEW.gauge(metrics.ENGINE_KV_CACHE_BLOCKS, by=("state",)), "{{state}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "KV cache usage by replica",
                "Share of an engine's KV cache blocks that running calls use. At the dashed line, calls are "
                "preempted or wait.",
                SHARE,
            ),
            Query(figures.kv_block_share(VIEW, "used", by=BY_REPLICA), REPLICA_LEGEND),
            limit=(0.95, BAD),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Evictions",
                "Finished sequences evicted from the prefix cache per second. If there are many while hits fall, the "
                "KV cache is too small for the number of conversations.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_EVICTIONS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Prefix cache hits by replica",
                "Share of the looked-up tokens that an engine's prefix cache contained. If a replica is far below the "
                "others, it has just started, or it serves different conversations.",
                SHARE,
                width=12,
            ),
            Query(figures.cache_hit_share(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Cached prompt tokens",
                "Share of prompt tokens that the verifier's prefix cache contained when a request arrived. If it is "
                "low although clients have long conversations, set prompt_cache_key.",
                SHARE,
                width=12,
            ),
            Query(figures.cached_prompt_share(ROUTER_VIEW), "cached"),
            max_value=1.0,
        ),
    ],
)

PROPOSALS = Row(
    "Token-level speculation",
    [
        time_series_panel(
            PanelOptions(
                "Tokens per forward pass",
                "Tokens that the target generates per forward pass with a token-level method. At the dashed line, the"
                " method saves nothing.",
            ),
            Query(figures.tokens_per_pass(ROUTER_VIEW, by=("method",)), "{{method}}"),
            limit=(1.0, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Acceptance rate by method",
                "Share of proposed tokens that the target accepted. The method draft is the draft of mode exact. If a "
                "share is low, the method predicts the target badly.",
                SHARE,
            ),
            Query(figures.proposals_accepted(ROUTER_VIEW, by=("method",)), "{{method}}"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Proposed tokens",
                "Tokens proposed to the target per second, by method. If there are none, speculative_configs of the "
                "target is empty, and no request uses mode exact.",
                TOKENS_PER_SECOND,
            ),
            Query(ROUTER_VIEW.rate(metrics.PROPOSED_TOKENS, by=("method",)), "{{method}}"),
            stacked=True,
        ),
        bar_gauge_panel(
            PanelOptions(
                "Acceptance rate by position",
                "Share of a method's tokens that were accepted, by their position in the proposal. Beyond the position "
                "where it is near zero, longer proposals are useless.",
                SHARE,
                width=16,
            ),
            Query(figures.acceptance_by_position(ROUTER_VIEW, figures.METHOD_PROPOSALS), "{{method}} {{position}}"),
            [(0.3, CAUTION), (0.6, GOOD)],
            base_colour=MUTED,
            max_value=1.0,
        ),
        bar_gauge_panel(
            PanelOptions(
                "Acceptance rate by position, drafts",
                "Share of draft tokens that were accepted in mode exact, by position. If it is low from the first "
                "positions on, the draft model words answers differently. Mode full or rounds then accepts more.",
                SHARE,
            ),
            Query(figures.acceptance_by_position(ROUTER_VIEW, figures.DRAFT_PROPOSALS), "{{position}}"),
            [(0.3, CAUTION), (0.6, GOOD)],
            base_colour=MUTED,
            max_value=1.0,
        ),
    ],
)

SERVERS = Row(
    "vLLM servers",
    [
        time_series_panel(
            PanelOptions(
                "Servers",
                "vLLM servers that engines call. If some are failing, the logs of the deployment say why, and the "
                "others get their requests. If all models run in the native engine, the numbers are zero.",
                "none",
                width=8,
            ),
            Query(VIEW.gauge(metrics.ENGINE_SERVERS, by=("deployment", "state")), "{{deployment}} {{state}}"),
        ),
        time_series_panel(
            PanelOptions(
                "Restarts",
                "How often replicas have started their own vLLM servers again. The logs of the deployment have the "
                "last lines of the server that has ended.",
                "none",
                width=8,
            ),
            Query(figures.server_restarts(VIEW, by=("deployment",)), "{{deployment}}"),
        ),
        time_series_panel(
            PanelOptions(
                "Acceptance rate of the servers' own speculation",
                "Share of the tokens proposed by the speculative_config of the vLLM servers that became part of "
                "answers. It includes the requests of other clients of these servers.",
                SHARE,
                width=8,
            ),
            Query(figures.server_proposals_accepted(VIEW, by=("deployment",)), "{{deployment}}"),
            max_value=1.0,
        ),
    ],
)

ENGINE = Board(
    "engine",
    "PARSE / Engine",
    "Throughput, batch sizes, KV cache and prefix cache of each replica, and token-level speculation.",
    ENGINE_VARIABLES,
    [NOW, PASSES, MEMORY, PROPOSALS, SERVERS],
)
