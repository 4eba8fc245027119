"""How a request is refused: the HTTP status, headers and OpenAI's error object. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class RequestError(Exception):
    """A request that is refused: the HTTP status, the fields of OpenAI's error object, headers of the answer."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def event(self) -> str:
        """The error as a server-sent event, for a stream that has begun."""
        return f"data: {json.dumps(self.body)}\n\n"


class OverBudget(RequestError):
    """429: a budget is spent for `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float):
        # Rounded up: who comes back a moment too early is refused again.
        headers = {"Retry-After": str(max(1, int(-(-retry_after_s // 1))))}
        super().__init__(message, status=429, code="rate_limit_exceeded", headers=headers)
