"""The page at /, and a policy under which a browser runs nothing but it."""

import re
from base64 import b64encode
from hashlib import sha256
from importlib import resources

from starlette.responses import HTMLResponse


def page() -> HTMLResponse:
    """page.html, whose one script and one style sheet are named by their digests."""
    html = resources.files("gdn2.serving").joinpath("page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        return f"'sha256-{b64encode(sha256(inline.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return HTMLResponse(html, headers=headers)
