"""Tables, queries, job transitions, leases and artefact storage.

Knows nothing of HTTP, queues or the method.
"""
