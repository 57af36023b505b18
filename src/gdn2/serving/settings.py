"""What a server allows, and to whom."""

import hmac
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server.

    Args:
        name: the model's, for clients.
        keys: API keys, any of which is accepted; none leaves the server open.
        hosts: names under which requests may address the server; none allows any. For a server that only this machine
            reaches they keep out web pages whose name was made to point here.
        queue: requests that may wait while all slots are taken; beyond that clients are told to come back.
        rate: requests a minute of one key, or of one address where there are no keys; 0 sets no limit.
        max_body: bytes of a request's body.
        max_prompt_tokens, max_new_tokens: of one prompt and of one text.
        timeout: seconds from a request to the end of its answer.
        body_timeout: seconds for a request's body to arrive.
        send_timeout: seconds that a client may take to accept the next piece of its answer.

    Raises:
        ValueError: a limit out of range, or an empty name.
    """

    name: str
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    queue: int = 64
    rate: int = 0
    max_body: int = 2**20
    max_prompt_tokens: int = 65_536
    max_new_tokens: int = 4_096
    timeout: float = 300.0
    body_timeout: float = 10.0
    send_timeout: float = 30.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the model's name is empty; expected one for clients to ask for")
        for limit, least in (("queue", 0), ("rate", 0), ("max_body", 1), ("max_prompt_tokens", 1)):
            _at_least(limit, getattr(self, limit), least)
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        for limit in ("timeout", "body_timeout", "send_timeout"):
            if not 0 < getattr(self, limit) < float("inf"):
                raise ValueError(f"{limit} is {getattr(self, limit)}; expected seconds above 0")

    def accepts(self, key: str) -> bool:
        """Whether `key` is one of the keys, in a time that tells nothing about them."""
        return sum(hmac.compare_digest(key.encode(), known.encode()) for known in self.keys) > 0


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; expected an integer >= {least}")


def read_keys(path: Path | None, environment: str) -> tuple[str, ...]:
    """API keys of a file, one a line, blank lines and those after # aside, and those of the environment's variable.

    Args:
        environment: keys separated by white space.

    Raises:
        ValueError: a file without keys, or a key that is not printable ASCII.
    """
    keys = environment.split()
    if path is not None:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"{str(path)!r} holds no key; expected one a line")
        keys += [line for line in lines if line]
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("a key has characters that no header can carry; expected printable ASCII without spaces")
    return tuple(keys)
