"""What the engines of drafters and verifiers do, replica by replica."""

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
                "Tokens that went through the models, a second: prompts, drafts, probes and what was written. Falling "
                "under the same load: look at batch and prefix cache.",
                TOKENS_PER_SECOND,
            ),
            VIEW.rate(metrics.ENGINE_TOKENS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Passes",
                "Forward passes a second, of all engines. None while calls are running: an engine hangs.",
                PER_SECOND,
            ),
            VIEW.rate(metrics.ENGINE_STEPS),
            base_colour=NEUTRAL,
        ),
        stat_panel(
            PanelOptions(
                "Batch",
                "Calls that share a pass, on average. Near 1 under load: requests come one by one, and the device is "
                "used badly.",
            ),
            figures.batch_size(VIEW),
            base_colour=NEUTRAL,
            decimals=1,
        ),
        stat_panel(
            PanelOptions(
                "Busy",
                "Share of their time that engines spend in passes, on average. Near 100%: at their limit, add "
                "replicas.",
                SHARE,
            ),
            figures.busy_share(VIEW),
            [(0.8, CAUTION), (0.95, BAD)],
            base_colour=GOOD,
        ),
        stat_panel(
            PanelOptions(
                "Prefix cache",
                "Share of tokens looked for that the prefix cache knew. Low: calls of a request do not meet the "
                "replica that knows it, or memory is short.",
                SHARE,
            ),
            figures.cache_hit_share(VIEW),
            [(0.2, CAUTION), (0.5, GOOD)],
            base_colour=BAD,
        ),
        stat_panel(
            PanelOptions(
                "Pages in use",
                "Share of the pages for keys and values that running calls hold. Near 100%: calls have to wait for "
                "memory, raise memory_mb.",
                SHARE,
            ),
            figures.kv_block_share(VIEW, "used"),
            [(0.8, CAUTION), (0.95, BAD)],
            base_colour=GOOD,
        ),
    ],
)

PASSES = Row(
    "Passes",
    [
        time_series_panel(
            PanelOptions(
                "Tokens by replica",
                "Tokens computed a second. Replicas of one deployment far apart: sessions weigh unevenly, or a device "
                "is slow.",
                TOKENS_PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_TOKENS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Passes by replica",
                "Forward passes a second. One at zero while calls are running: it hangs, and its health check will "
                "replace it.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_STEPS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Batch by replica",
                "Calls that share a pass, on average. The larger, the more is done with one reading of the weights; at "
                "max_running calls begin to wait.",
            ),
            Query(figures.batch_size(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Busy by replica",
                "Share of its time that an engine spends in passes. At the dashed line it has nothing to give.",
                SHARE,
            ),
            Query(figures.busy_share(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
            limit=(0.95, BAD),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Calls running",
                "Calls an engine is at work on. Much below max_running while calls wait: memory is what they wait for.",
            ),
            Query(VIEW.gauge(metrics.ENGINE_REQUESTS_RUNNING, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Calls waiting",
                "Calls that wait for an engine. More than a few for minutes: add replicas, or memory.",
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
                "Pages",
                "Pages for keys and values: used by running calls, idle (kept for those who come with the same "
                "beginning), free. No idle and no free ones: calls wait for memory.",
                "none",
            ),
            Query(VIEW.gauge(metrics.ENGINE_KV_CACHE_BLOCKS, by=("state",)), "{{state}}"),
            stacked=True,
        ),
        time_series_panel(
            PanelOptions(
                "Pages in use by replica",
                "Share of an engine's pages that running calls hold. At the dashed line calls are set back or wait.",
                SHARE,
            ),
            Query(figures.kv_block_share(VIEW, "used", by=BY_REPLICA), REPLICA_LEGEND),
            limit=(0.95, BAD),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Evictions",
                "Pages of the prefix cache that were given up for others, a second. Many while hits fall: too little "
                "memory for the conversations there are.",
                PER_SECOND,
            ),
            Query(VIEW.rate(metrics.ENGINE_EVICTIONS, by=BY_REPLICA), REPLICA_LEGEND),
        ),
        time_series_panel(
            PanelOptions(
                "Prefix-cache hits by replica",
                "Share of tokens looked for that an engine's prefix cache knew. A replica far below the others has "
                "just started, or meets other conversations.",
                SHARE,
                width=12,
            ),
            Query(figures.cache_hit_share(VIEW, by=BY_REPLICA), REPLICA_LEGEND),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Prompts known already",
                "Share of prompt tokens that the verifier knew when a request came. Low where clients hold long "
                "conversations: set prompt_cache_key.",
                SHARE,
                width=12,
            ),
            Query(figures.cached_prompt_share(ROUTER_VIEW), "known"),
            max_value=1.0,
        ),
    ],
)

PROPOSALS = Row(
    "Token by token: what the target is offered and takes",
    [
        time_series_panel(
            PanelOptions(
                "Tokens per pass",
                "Tokens that the target writes in a pass, where a method proposes what may follow. At the dashed line "
                "it might as well write one by one: the method gains nothing here.",
            ),
            Query(figures.tokens_per_pass(ROUTER_VIEW, by=("method",)), "{{method}}"),
            limit=(1.0, BAD),
        ),
        time_series_panel(
            PanelOptions(
                "Accepted share by method",
                "Share of proposed tokens that the target would have written itself; draft is the draft of mode exact. "
                "Low: the method does not know the target's words.",
                SHARE,
            ),
            Query(figures.proposals_accepted(ROUTER_VIEW, by=("method",)), "{{method}}"),
            max_value=1.0,
        ),
        time_series_panel(
            PanelOptions(
                "Proposed tokens",
                "Tokens proposed to the target, a second, by the method that proposes. None: the target's settings "
                "name no method, and no request asks for mode exact.",
                TOKENS_PER_SECOND,
            ),
            Query(ROUTER_VIEW.rate(metrics.PROPOSED_TOKENS, by=("method",)), "{{method}}"),
            stacked=True,
        ),
        bar_gauge_panel(
            PanelOptions(
                "Accepted share by place",
                "Share of a method's tokens that were accepted, by their place in the proposal. It falls with the "
                "place; where it nears zero, longer proposals are for nothing.",
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
                "Accepted share by place, drafts",
                "The same of whole drafts in mode exact. Low from the first places on: the draft model words things "
                "otherwise than the target, and mode full or rounds would keep more.",
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
    "What each replica computes, how full it is, and what its cache spares it.",
    ENGINE_VARIABLES,
    [NOW, PASSES, MEMORY, PROPOSALS],
)
