"""Progress of a running trainer, asked from its pod."""

from __future__ import annotations

import aiohttp

from taskoffer.api.contract import PROGRESS_PORT, ProgressReport

MAX_REPORT_BYTES = 262_144
"""A longer answer is not read to its end."""


async def fetch_report(session: aiohttp.ClientSession, pod_ip: str, *, seconds: float = 2.0) -> ProgressReport | None:
    """Return what the trainer says, or None when it does not answer.

    The answer comes from a pod that runs foreign data, so its size is bounded and its shape is checked. Fields that
    only a newer trainer knows are passed over.

    Raises:
        ValueError: the answer is too long or no report.
    """
    host = f"[{pod_ip}]" if ":" in pod_ip else pod_ip
    try:
        async with session.get(
            f"http://{host}:{PROGRESS_PORT}/progress",
            timeout=aiohttp.ClientTimeout(total=seconds),
            allow_redirects=False,
        ) as answer:
            if answer.status != 200:
                return None
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > MAX_REPORT_BYTES:
                    raise ValueError(f"more than {MAX_REPORT_BYTES} bytes")
    except (TimeoutError, aiohttp.ClientError, OSError):
        return None
    return ProgressReport.model_validate_json(bytes(body), extra="ignore")
