"""A run of slow jobs in worker processes that Ctrl-C may end: prints what it has.  Arguments: cache, log, seconds."""

import sys

from mugraph.pipeline import interruptible
from mugraph.runtime.cache import Cache
from mugraph.runtime.engine import Job, completed, engine_of

cache, log, seconds = sys.argv[1:]
jobs = [Job("tests.runtime.jobs:slow", {"x": x, "seconds": float(seconds), "log": log}) for x in range(6)]
with interruptible() as stop, engine_of("processes", workers=2) as engine:
    print("ready", flush=True)
    results = completed(engine, jobs, Cache(cache), stop)
print([r and r["square"] for r in results])
