"""Renew ``docs/pictures/report.png``: the top of a report's page, as Chromium shows it.

Run it with ``python docs/report_picture.py``; it needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ecp

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "report.png"
SIZE, LARGEST = (960, 865), 150_000
# A page needs none of what a browser does besides.
QUIET = (
    "--headless", "--disable-gpu", "--no-sandbox", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--blink-settings=preferredColorScheme=1",
)  # fmt: skip


def main() -> int:
    """Prune the model of the README, and take the picture; the exit code."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("error: no chromium or google-chrome on the PATH.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        onnx_ecp.optimize(ROOT / "models" / "digits.onnx", sparsity=0.8, report=page)
        text = page.read_text().replace(f"{ROOT}/", "")
        page.write_text(text)
        command = [browser, *QUIET, f"--user-data-dir={folder}/browser", f"--screenshot={PICTURE}"]
        command += [f"--window-size={SIZE[0]},{SIZE[1]}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    size = PICTURE.stat().st_size
    print(f"{PICTURE.relative_to(ROOT)}: {size:,} bytes")
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
