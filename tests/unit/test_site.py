"""The site: mkdocs builds it without a warning, so that every link, heading and name in it exists."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_is_built_strictly(tmp_path):
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    assert all(f"distlora.{name}" in api for name in ("api.attach.attach", "errors.UserError"))
