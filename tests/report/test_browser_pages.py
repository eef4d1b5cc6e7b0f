"""Pages in headless Chromium, where there is one: no error, no request, nothing out of place."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from page_parts import EVIL, make_iteration, make_run

from dpo_kernels.report import write_page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")

# The page in a frame of a width, and what a script outside of it sees there.
LOOK = """<!doctype html><body><iframe src="{page}" width="{width}" height="3000"></iframe>
<script>
onload = () => {{
  const inside = document.querySelector("iframe").contentDocument;
  const found = {{wide: inside.documentElement.scrollWidth, small: [], over: [], broken: []}};
  for (const svg of inside.querySelectorAll("svg")) {{
    const labels = [...svg.querySelectorAll("text")];
    const boxes = labels.map(t => t.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) {{
      const size = parseFloat(inside.defaultView.getComputedStyle(labels[i]).fontSize);
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      if (size * scale < 9.5) found.small.push(labels[i].textContent);
      for (let j = 0; j < i; j++) {{
        const a = boxes[i], b = boxes[j], x = 0.5, y = 2;
        if (a.left + x < b.right && b.left + x < a.right && a.top + y < b.bottom - y &&
            b.top + y < a.bottom - y)
          found.over.push([labels[i].textContent, labels[j].textContent]);
      }}
    }}
  }}
  for (const cell of inside.querySelectorAll("td.n, .line")) {{
    const range = inside.createRange();
    range.selectNodeContents(cell);
    const lines = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
    if (lines.size > 1) found.broken.push(cell.textContent);
  }}
  document.body.textContent = JSON.stringify(found);
}};
</script></body>"""


def chromium(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER),
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--allow-file-access-from-files", "--enable-logging=stderr", "--v=0"),
        f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    evil = make_run(
        root / "evil<b>",
        summary={"steps": 40, "loss": EVIL, "sample": {"prompt": EVIL, "before": EVIL}},
        change=lambda i, row: row.update({EVIL: 1.0, "groups/a/offset": 0.1 * i}),
    )
    runs = [make_run(root / f"run{i}", 30 + i) for i in range(3)]
    loop = make_iteration(root / "loop")
    given = {"evil": [evil], "several": runs, "loop": [loop]}
    return {name: write_page(paths, root / f"{name}.html") for name, paths in given.items()}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["evil", "several", "loop"])
def test_in_a_browser(pages: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    outside = tmp_path / "look.html"
    outside.write_text(LOOK.format(page=pages[name].as_uri(), width=width))
    log = tmp_path / "net.json"
    done = chromium(
        tmp_path,
        "--dump-dom",
        f"--log-net-log={log}",
        "--virtual-time-budget=8000",
        outside.as_uri(),
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    body = re.search(r"<body>(.*)</body>", done.stdout, re.S)
    assert body is not None, done.stdout[:500]
    found = json.loads(unescape(body[1]))
    assert found == {"wide": width, "small": [], "over": [], "broken": []}
    assert "evil.example" not in log.read_text()
    asked = re.findall(r'"initiator":"(?!not an origin)[^"]*"[^}]*"url":"([^"]+)"', log.read_text())
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
