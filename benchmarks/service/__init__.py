"""What the service costs: beside a bare endpoint, plain Celery, a plain copy, nginx, and `seuf run`.

    stage       the programs of one measurement: API, database, broker, workers
    wire        a lean HTTP client, so that the servers are measured and not the client
    bare        the endpoint that ours is held against
    latency     POST /jobs and GET /jobs/{id}
    streams     500 watchers of one job on one API process
    throughput  jobs of no work beside plain Celery tasks; from claim to first step
    transfer    upload and download beside a copy and nginx
    whole       a whole job beside `seuf run`
    load        everything at once for a minute
    page        docs/results/service.md from the figures
"""
