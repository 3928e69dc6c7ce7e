"""How captions look on the page: HTML whose words can be clicked, and its script and style."""

import html
import json

SCORE = "Scores are mean log-probabilities per token: nearer to 0 is likelier."
CLICK = "Click a word to see which prefix vectors it attends to, and the words that these resemble."

# Runs once for each element that shows captions. Whatever comes from a model enters as text, never as markup.
SCRIPT = """
element.addEventListener('click', (event) => {
  const word = event.target.closest('button.word');
  if (!word) return;
  const result = word.closest('.result'), panel = result.querySelector('.attention');
  const shown = word.getAttribute('aria-pressed') === 'true';
  result.querySelectorAll('button.word').forEach((other) => other.setAttribute('aria-pressed', 'false'));
  panel.replaceChildren();
  if (shown) return;
  word.setAttribute('aria-pressed', 'true');
  const make = (tag, kind, text) => Object.assign(document.createElement(tag), { className: kind, textContent: text });
  const rows = JSON.parse(word.dataset.attended), most = rows[0][1];
  const list = make('ul', 'bars', '');
  panel.append(make('p', 'about', `“${word.textContent}” attends to`), list);
  rows.forEach(([number, share, near]) => {
    const row = make('li', '', ''), track = make('span', 'track', ''), bar = make('span', 'bar', '');
    bar.style.width = `${100 * share / most}%`;
    track.append(bar);
    row.append(make('span', 'vector', `vector ${number}`), track, make('span', 'share', `${(100 * share).toFixed(0)} %`));
    row.append(make('span', 'near', near ? `near: ${near}` : ''));
    list.append(row);
  });
});
"""

STYLE = """
/* What gradio's own style leaves to us: width, contrast, and how captions look. */
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.result { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem 1rem; margin-bottom: .8rem;
  background: var(--background-fill-primary); color: var(--body-text-color); overflow-wrap: anywhere; }
.result h3 { margin: 0 0 .4rem; font-size: .95rem; color: var(--body-text-color-subdued); font-weight: 600; }
.result ol { list-style: none; margin: 0; padding: 0; }
.result ol li { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem 1rem; padding: .25rem 0; }
.result .caption { margin: 0; font-size: 1.1rem; line-height: 1.7; flex: 1 1 12rem; }
.result .score { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; align-self: center; }
.result button.word { font: inherit; color: inherit; background: none; border: 0; border-bottom: 1px dotted currentColor;
  border-radius: 3px; padding: 0 .1rem; margin-right: .25rem; cursor: pointer; }
.result button.word:hover { background: var(--background-fill-secondary); }
.result button.word:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.result button.word[aria-pressed="true"] { background: var(--color-accent); color: white; border-bottom-color: transparent; }
.result .about { margin: .6rem 0 .3rem; }
.result ul.bars { list-style: none; margin: 0; padding: 0; font-size: .85rem; }
.result ul.bars li { display: grid; grid-template-columns: 5rem minmax(4rem, 2fr) 3rem minmax(0, 3fr); gap: .6rem; align-items: center;
  padding: .12rem 0; }
.result .track { background: var(--background-fill-secondary); border-radius: 3px; height: .7rem; }
.result .bar { display: block; background: var(--color-accent); border-radius: 3px; height: 100%; }
.result .share { text-align: right; font-variant-numeric: tabular-nums; }
.result .near { color: var(--body-text-color-subdued); }
ul.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr)); }
ul.cards .result { margin: 0; padding: .6rem; }
ul.cards img { width: 100%; height: 11rem; object-fit: contain; background: var(--background-fill-secondary); border-radius: 5px; }
ul.cards .caption { font-size: 1rem; line-height: 1.4; flex-basis: 100%; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
footer .divider { display: none; }
.problem { border-left: 4px solid #d33; padding: .5rem .8rem; margin: 0 0 .8rem; background: var(--background-fill-secondary);
  color: var(--body-text-color); overflow-wrap: anywhere; }
.hint { color: var(--body-text-color-subdued); font-size: .85rem; margin: .2rem 0; }
@media (max-width: 480px) {
  .result ul.bars li { grid-template-columns: 4.5rem 1fr 2.6rem; }
  .result .near { grid-column: 1 / -1; padding-bottom: .3rem; }
}
"""


def text(value):
    """Escape any value as text of HTML."""
    return html.escape(str(value).encode("utf-8", "replace").decode(), quote=True)


def show_problem(message):
    """Show an error; screen readers speak it at once."""
    return f'<p class="problem" role="alert">{text(message)}</p>'


def show_hint(message):
    """Show a remark."""
    return f'<p class="hint">{text(message)}</p>'


def show_outcomes(outcomes):
    """Show what every captioner says, side by side on a wide screen.

    Args:
        outcomes: list of page.captioners.Outcome.

    Returns:
        HTML.
    """
    clickable = any(word.attended for outcome in outcomes for words in outcome.words for word in words)
    return "".join(_show_outcome(one) for one in outcomes) + show_hint(f"{SCORE} {CLICK}" if clickable else SCORE)


def show_cards(items):
    """Show the pictures of a folder with their captions.

    Args:
        items: list of (name of a file, data URI of its picture, list of Outcome).

    Returns:
        HTML.
    """
    cards = []
    for name, uri, outcomes in items:
        said = next((outcome.captions[0][0].strip() for outcome in outcomes if outcome.captions), name)
        shown = "".join(f"<h3>{text(one.name)}</h3>" * (len(outcomes) > 1) + _show_captions(one) for one in outcomes)
        cards.append(f'<li class="result"><img src="{uri}" alt="{text(said)}"><p class="hint">{text(name)}</p>{shown}</li>')
    return f'<ul class="cards">{"".join(cards)}</ul>' + show_hint(SCORE) if cards else ""


def _show_outcome(outcome):
    """Show what one captioner says."""
    head = f'<section class="result" aria-label="Captions by {text(outcome.name)}"><h3>{text(outcome.name)}</h3>'
    return f'{head}{_show_captions(outcome)}<div class="attention" aria-live="polite"></div></section>'


def _show_captions(outcome):
    """Show the captions of one captioner, or why there are none."""
    if outcome.error:
        return show_problem(outcome.error)
    rows = []
    for number, (caption, score) in enumerate(outcome.captions):
        words = outcome.words[number] if outcome.words else []
        shown = "".join(_show_word(word) for word in words) or text(caption.strip() or "(an empty caption)")
        rows.append(f'<li><p class="caption">{shown}</p><span class="score" title="{text(SCORE)}">{score:.3f}</span></li>')
    return f"<ol>{''.join(rows)}</ol>"


def _show_word(word):
    attended = json.dumps([[number, round(share, 4), near] for number, share, near in word.attended])
    return f'<button type="button" class="word" aria-pressed="false" data-attended="{text(attended)}">{text(word.text)}</button>'
