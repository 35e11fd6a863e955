"""The HTML of `report.html`, a Jinja template; `runtime/report.py` says what it is given."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
:root { color-scheme: light; --ink: #1c2330; --soft: #5b6575; --line: #dfe3ea;
        --good: #00684a; --bad: #a8320a; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
     border-bottom: 1px solid var(--line); }
.lead { font-size: 1.15rem; margin: .2rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; gap: .8rem; margin: 1.2rem 0;
         grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.better { color: var(--good); } .worse { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
th { font-weight: 600; }
.facts td { text-align: left; font-size: .9rem; white-space: normal; }
.dot { display: inline-block; width: .8em; height: .8em; margin-right: .3em;
       border-radius: 50%; border: 1px solid #222; }
video, img { max-width: 100%; height: auto; display: block; } figure { margin: 1rem 0 1.8rem; }
pre { background: #f5f7fa; border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
      overflow-x: auto; font: .85rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin: .8rem 0; } summary { cursor: pointer; } .wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
{% for sentence in sentences %}
<p class="lead">{{ sentence }}</p>
{% endfor %}
{% if measured %}
<p class="soft">Measured on {{ measured }}.</p>
{% endif %}
{% if origin %}
<p class="soft">{{ origin }}</p>
{% endif %}
{% if cards %}
<div class="cards">
{% for card in cards %}
<div class="card"><span class="soft">{{ card.label }}{{ ", " + card.unit if card.unit }}</span>
<b>{{ card.arrow }}</b>
<span class="{{ card.verdict }}">{{ card.percent }} {{ card.verdict }}</span></div>
{% endfor %}
</div>
{% endif %}
{% if table %}
<h2>Before and after</h2>
<div class="wide"><table>
<tr><th>Metric</th>{% for name in sets %}<th>{{ name }}</th>{% endfor %}<th>change</th></tr>
{% for row in table %}
<tr><td>{{ row.label }}{{ ", " + row.unit if row.unit }}
{% if row.better %}<span class="soft">({{ row.better }} is better)</span>{% endif %}</td>
{% for name in sets %}<td>{{ row["values"][name] }}</td>{% endfor %}
<td class="{{ row.verdict }}">{{ row.percent }} {{ row.verdict }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">± is half of a 95 % interval over clips, not over training seeds.
truth: the true clips, measured in the same way.
{% if extractor %}
Fréchet distances use {{ extractor }}; they cannot be compared with those of another extractor.
{% endif %}</p>
{% endif %}
{% if course.body %}
<details><summary>Every evaluation of the run</summary><div class="wide"><table>
<tr>{% for head in course.head %}<th>{{ head | select | join(", ") }}</th>{% endfor %}</tr>
{% for row in course.body %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endif %}
{% if videos %}
<h2>Videos</h2>
<p class="soft">
{% for colour, text in legend %}
<span class="dot" style="background: {{ colour }}"></span>{{ text }} &ensp;
{% endfor %}
The closer magenta follows yellow, the better.</p>
{% for title, data in videos %}
<figure><video autoplay loop muted playsinline aria-label="{{ title }}"
src="data:video/mp4;base64,{{ data }}"></video>
<figcaption class="soft">{{ title }}</figcaption></figure>
{% endfor %}
{% endif %}
{% if curves %}
<h2>Curves</h2>
<img alt="Metrics over the updates of the run" src="data:image/png;base64,{{ curves }}">
{% endif %}
{% if schedule %}
<h2>Schedule of stochastic steps</h2>
<pre>{{ schedule }}</pre>
<p class="soft">● stochastic step, · deterministic step; columns are noise levels.</p>
{% endif %}
{% if command or facts or config %}
<h2>Reproduce</h2>
{% if command %}
<pre>{{ command }}</pre>
{% endif %}
{% if facts %}
<table class="facts">
{% for key, value in facts %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if config %}
<details><summary>Resolved configuration</summary><pre>{{ config }}</pre></details>
{% endif %}
{% endif %}
</body>
</html>
"""
