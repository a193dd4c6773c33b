"""The folder of compiled kernels, which all backends share."""

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "CHATGLM_CACHE"


def get_cache_folder() -> Path:
    """Return the folder that $CHATGLM_CACHE names, or one in the user's cache; it may not exist."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "chatglm2"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "chatglm2"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatglm2"
