"""Pages of what is in folders: training runs, iterations; and the charts that every page is of.

A page is one HTML file: inline SVG, no script, nothing that is fetched. It reads files alone, so a
run that was killed, or one that another machine made, has its page too. Numbers come from
`numbers_text`, charts from `charts`, the frame and its escaping from `html_page`.
"""

from .folders import NoRun as NoRun
from .folders import runs_in as runs_in
from .written import write_page as write_page
