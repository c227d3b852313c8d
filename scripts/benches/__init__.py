"""What `scripts/bench` measures: one module per bench, each with `measure(plan) -> list[Row]`."""

from __future__ import annotations

BENCHES = {
    "single": "one sequence through 1, 2 and 3 stages, against the whole model in one process",
    "hop": "what a hop adds to a token",
    "aggregate": "1, 4, 8 and 16 clients at once, against one",
    "stage": "many sessions' tokens in one forward of a stage alone, against one's, by processor time",
    "prefill": "a prompt of 512 tokens through two stages, against the whole model in one process",
    "mixed": "the gaps between tokens of four clients, while prompts of 1,024 keep arriving",
    "wan": "peers 25 ms apart: straight from stage to stage, and with several tokens in a trip",
    "startup": "from launching two peers to a client's first token",
    "memory": "what a peer with the whole model takes, and in how many processes",
    "failover": "how long an answer stands still when a hop is killed, with and without standby",
    "drain": "the longest gap between tokens that four clients see while a peer leaves",
    "soak": "ten minutes of clients that come, go, cancel and die: memory, sessions left, answers",
    "quant": "one sequence through two stages with int8 and int4 weights, against the whole model in fp32",
    "quality": "perplexity through peers with exact, int8 and int4 weights, against the whole model in fp32",
    "allreduce": "gradients of 1M to 50M values averaged by 2 and 4 processes, beside hivemind and gloo",
    "round": "the fixed cost of a round with 2 and 4 replicas",
    "train": "two stages that train, one thread each, against one process with one thread",
    "trainmemory": "what a training peer takes, against what its weights, gradients and moments need",
    "join": "from launching a late joiner of a 20M-parameter stage to its counting",
    "wire": "echoes of 1.2 KB to 8 MiB over the transport, against bare TLS",
}
"""Every bench by its name, which is its module's, in the order in which `all` runs them."""
