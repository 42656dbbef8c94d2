"""Looks around where it should see nothing, and leaves nothing. It fails where it sees or reaches more."""

import os
from pathlib import Path


def writable(folder: Path) -> bool:
    try:
        (folder / "mine").write_text("x", encoding="utf-8")
    except OSError:
        return False
    return True


cache = Path("/cache")
seen = {path.relative_to(cache).parts[0] for path in cache.iterdir()}
assert seen == {"models", "datasets", "hf_cache"}, seen
assert len(list((cache / "models").iterdir())) == len(list((cache / "datasets").iterdir())) == 1
for secret in ("/var/run/secrets/kubernetes.io", "/etc/taskoffer-secrets", "/etc/taskoffer", "/data"):
    assert not Path(secret).exists(), secret
assert not [name for name in os.environ if name.endswith("TOKEN")], os.environ
assert not writable(next((cache / "models").iterdir()))
assert not writable(Path(__file__).parent)
assert writable(cache / "hf_cache")
assert writable(Path.home())
assert os.getuid() != 0
print("nothing to see here", flush=True)
