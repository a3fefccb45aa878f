"""x"""
from pathlib import Path
import os
def default_cache() -> Path:
    import platformdirs
    return Path(os.environ.get("KENAZ_CACHE_DIR") or platformdirs.user_cache_dir("kenaz"))
