"""The Python client of the service: HTTP only, typed answers, resumable downloads.

from client import Client

with Client("http://127.0.0.1:8321", "seuf_...") as seuf:
    forget = seuf.upload("forget.jsonl", "forget")
    job = seuf.submit(model="tiny", forget_set=forget["id"], retain_set=retain["id"])
    for event in seuf.events(job["id"]):
        print(event["type"], event["data"])
    seuf.download(seuf.job(job["id"])["checkpoint"], "unlearned")
"""

from client.client import Client
from client.errors import ApiError, ClientError, DownloadError, UnreachableError

__all__ = ["ApiError", "Client", "ClientError", "DownloadError", "UnreachableError"]
