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
                "Tokens computed by the models per second: prompts, drafts, verification suffixes and answers. If it"
                " falls under the same load, check batch size and prefix cache.",
                TOKENS_PER_SECOND,
            ),
            VIEW.rate(metrics.ENGINE_TOKENS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Forward passes",
                "Forward passes per second of all engines. None while calls are running: an engine hangs.",
                PER_SECOND,
            ),
            VIEW.rate(metrics.ENGINE_STEPS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Batch size",
                "Mean number of calls per forward pass. Near 1 under load, requests arrive one by one and the device"
                " is used badly.",
            ),
            figures.batch_size(VIEW),
            base_colour=NEUTRAL,
            decimals=1,
        ),
        stat_panel(
            PanelOptions(
                "Busy",
                "Mean share of their time that engines spend in forward passes. Near 100%, add replicas.",
                SHARE,
            ),
            figures.busy_share(VIEW),
            [(0.8, CAUTION), (0.95, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Prefix cache hits",
                "Share of the looked-up tokens that the prefix cache contained. Low: the calls of a conversation "
                "reach different replicas, or the KV cache is too small.",
                SHARE,
            ),
            figures.cache_hit_share(VIEW),
            [(0.2, CAUTION), (0.5, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "KV cache usage",
                "Share of the KV cache blocks that running calls use. Near 100%, calls wait for memory: raise "
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
                "Tokens computed per second. Large differences between replicas of one deployment: the load is "
                "uneven, or a device is slow.",
                TOKENS_PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_TOKENS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Forward passes by replica",
                "Forward passes per second. A replica at zero while calls are running hangs; its health check will "
                "replace it.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_STEPS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Batch size by replica",
                "Mean number of calls per forward pass. Larger batches use the device better. At max_num_seqs, "
                "further calls wait.",
            ),
            Query(figures.batch_size(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Busy by replica",
                "Share of its time that an engine spends in forward passes. At the dashed line it has no capacity "
                "left.",
                SHARE,
            ),
            Query(figures.busy_share(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
            limit=(0.95, BAD),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Running calls",
                "Calls that an engine is working on. Far below max_num_seqs while calls wait: they wait for memory.",
            ),
            Query(VIEW.gauge(metrics.ENGINE_REQUESTS_RUNNING, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Waiting calls",
                "Calls that wait for an engine. More than a few for minutes: add replicas or memory.",
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
                "Blocks of the KV cache: used by running calls, idle (held only by the prefix cache), free. Without "
                "idle and free blocks, calls wait for memory.",
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
                "Blocks evicted from the prefix cache per second. Many while hits fall: the KV cache is too small "
                "for the number of conversations.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_EVICTIONS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Prefix cache hits by replica",
                "Share of the looked-up tokens that an engine's prefix cache contained. A replica far below the "
                "others has just started, or gets other conversations.",
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
                "Tokens that the target generates per forward pass with a token-level method. At the dashed line the"
                " method gains nothing.",
            ),
            Query(figures.tokens_per_pass(ROUTER_VIEW, by=("method",)), "{{method}}"),
            limit=(1.0, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Acceptance rate by method",
                "Share of proposed tokens that the target accepted. draft is the draft of mode exact. Low: the "
                "method predicts the target badly.",
                SHARE,
            ),
            Query(figures.proposals_accepted(ROUTER_VIEW, by=("method",)), "{{method}}"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Proposed tokens",
                "Tokens proposed to the target per second, by method. None: speculative_configs of the target is "
                "empty, and no request uses mode exact.",
                TOKENS_PER_SECOND,
            ),
            Query(ROUTER_VIEW.rate(metrics.PROPOSED_TOKENS, by=("method",)), "{{method}}"),
            stacked=True,
        ),
        bar_gauge_panel(
            PanelOptions(
                "Acceptance rate by position",
                "Share of a method's tokens that were accepted, by their position in the proposal. Where it nears "
                "zero, longer proposals are useless.",
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
                "The same for drafts in mode exact. Low from the first positions on: the draft model words answers "
                "differently, so mode full or rounds accepts more.",
                SHARE,
            ),
            Query(figures.acceptance_by_position(ROUTER_VIEW, figures.DRAFT_PROPOSALS), "{{position}}"),
            [(0.3, CAUTION), (0.6, GOOD)],
            base_colour=MUTED,
            max_value=1.0,
        ),
    ],
)

ENGINE = Board(
    "engine",
    "PARSE / Engine",
    "Throughput, batch sizes, KV cache and prefix cache of each replica, and token-level speculation.",
    ENGINE_VARIABLES,
    [NOW, PASSES, MEMORY, PROPOSALS],
)
