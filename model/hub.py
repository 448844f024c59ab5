"""Downloads from Hugging Face's hub: without a network they fail at once."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


@contextmanager
def fails_at_once() -> Iterator[None]:
    """Inside the block, where the hub's name is unknown and no proxy leads to it, the hub's cache
    alone is used. Otherwise its client asks again and again for a minute before it says so.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _may_answer(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _may_answer(url: str) -> bool:
    address = urlsplit(url)
    if {address.scheme, "all"} & getproxies().keys() and not proxy_bypass(address.netloc):
        return True
    try:
        return bool(socket.getaddrinfo(address.hostname, None))
    except OSError:
        return False
