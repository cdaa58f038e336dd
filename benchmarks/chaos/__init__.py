"""Chaos: real jobs on a real service whose processes are killed, stopped and starved while it works.

- keeper: processes that are started again when they fall
- parts: Postgres, Redis and a disk of its own, as a machine would run them
- service: one whole service on one lane, and what its database says
- receiver: where its webhooks arrive
- orders: the jobs: what is asked, when it is submitted, which are cancelled in which phase
- faults: which process is killed, drawn from a seed
- moments: kills in moments that chance would seldom hit
- troubles: faults that kill nothing of ours
- scene: the loop that keeps service and jobs going while a fault waits
- play: one lane from its start to its verdict
- verdict: what must hold at the end, looked up in database, storage and processes
- page: docs/results/chaos.md from the figures
"""
