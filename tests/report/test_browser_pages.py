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
    surprise = {"source": "/folder" * 30 + ":3", "margin": -2.0, "p_chosen": 0.1, "prompt": EVIL}
    (evil / "surprising_pairs.jsonl").write_text(json.dumps(surprise) + "\n")
    runs = [make_run(root / f"run{i}", 30 + i) for i in range(3)]
    loop = make_iteration(root / "loop")
    given = {"evil": [evil], "several": runs, "loop": [loop]}
    return {name: write_page(paths, root / f"{name}.html") for name, paths in given.items()}


def looked_at(page: Path, width: int, folder: Path) -> tuple[dict, str, list[str]]:
    """(what stands where, errors of the console, what the page asked the network for)."""
    outside = folder / "look.html"
    outside.write_text(LOOK.format(page=page.as_uri(), width=width))
    log = folder / "net.json"
    options = ("--dump-dom", f"--log-net-log={log}", "--virtual-time-budget=8000")
    done = chromium(folder, *options, outside.as_uri())
    body = re.search(r"<body>(.*)</body>", done.stdout, re.S)
    assert body is not None, done.stdout[:500]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    events = [e.get("params", {}) for e in json.loads(log.read_text())["events"]]
    # The browser's own requests (updates, the time) have no page that began them.
    asked = [p["url"] for p in events if p.get("initiator", "not an origin") != "not an origin"]
    return json.loads(unescape(body[1])), console, [u for u in asked if u.startswith("http")]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["evil", "several", "loop"])
def test_in_a_browser(pages: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    found, console, asked = looked_at(pages[name], width, tmp_path)
    assert console == "" and asked == []
    assert found == {"wide": width, "small": [], "over": [], "broken": []}


def test_the_look_sees_what_is_wrong(tmp_path: Path) -> None:
    """A page that fetches, wraps its numbers, hides labels and runs over the screen."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><img src='http://evil.example/x.png'><script>nothing()</script>"
        "<svg viewBox='0 0 360 60' style='width:100px'><text y='20'>tiny</text></svg>"
        "<svg viewBox='0 0 360 60' style='width:360px; font-size:11px'><text y='20'>one</text>"
        "<text y='22'>two</text></svg><div style='width:2000px'>wide</div>"
        "<table><td class='n' style='width:1px'>1 2 3"
    )
    found, console, asked = looked_at(bad, 390, tmp_path)
    assert "nothing is not defined" in console and asked == ["http://evil.example/x.png"]
    assert found["wide"] > 1900 and found["small"] == ["tiny"]
    assert found["over"] == [["two", "one"]] and found["broken"] == ["1 2 3"]
