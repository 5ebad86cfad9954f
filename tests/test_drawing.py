"""The pictures: they show what the objects hold, in the style of the book, and the appendix's exercises are checked.

The drawing functions get axes of matplotlib's, whose boxes and texts are then looked at."""
import re
from html import escape

import pytest

import run_notebooks
from book import ROOT, chapters
from exercise_answers import Answers, assert_all_tried, checks_of, name_of, try_answer
from nano_vllm import drawing
from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler
from solutions.checks import drawing as exercises

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

SVG = "image/svg+xml"


def axes(): return Figure().subplots()


def texts(ax): return [t.get_text() for t in ax.texts]


def colors(ax): return [matplotlib.colors.to_hex(bar.get_facecolor()) if bar.get_facecolor()[3] else "none" for bar in ax.patches]


def new(name, prompt_len, max_tokens=2, first=0):
    return Sequence(name, list(range(first, first + prompt_len)), SamplingParams(max_tokens=max_tokens), max_len=prompt_len + max_tokens)


def schedule(scheduler, seqs):
    for seq in seqs: scheduler.add(seq)
    outputs = []
    while scheduler.waiting or scheduler.running:
        outputs.append(scheduler.schedule())
        scheduler.update(outputs[-1], [7] * len(outputs[-1].sampled))
        for s in outputs[-1].sampled:
            if s.seq.num_tokens == s.seq.max_len: scheduler.finish(s.seq, "length")
    return outputs


def test_a_gantt_chart_shows_every_token_of_a_real_schedule_once():
    outputs = schedule(Scheduler(KVCacheManager(20, 4), 8, 6), [new("A", 8), new("B", 5, first=50)])
    ax = axes()
    drawing.gantt(ax, outputs)
    assert texts(ax) == [str(s.num_tokens) for o in outputs for s in o.scheduled]
    kinds = ["decode" if s.start >= len(s.seq.prompt_token_ids) else "prompt" for o in outputs for s in o.scheduled]
    assert colors(ax) == [drawing.COLORS[kind] for kind in kinds] and set(kinds) == {"prompt", "decode"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["A", "B"]


def test_a_gantt_chart_shows_cached_tokens_and_lost_blocks():
    scheduler = Scheduler(KVCacheManager(5, 4), 8, 64)
    outputs = schedule(scheduler, [new("A", 8, 6), new("B", 7, 6, first=50)])
    ax = axes()
    drawing.gantt(ax, outputs)
    crosses = [line.get_xydata()[0].tolist() for line in ax.lines]
    assert len(crosses) == scheduler.num_preemptions == 1 and crosses[0][1] == 1    # B's
    cached = [s.start for o in outputs for s in o.admitted if s.start]
    assert cached and colors(ax).count(drawing.COLORS["cached"]) == len(cached)


def test_tables_and_pool_show_the_same_blocks():
    manager = KVCacheManager(6, 4)
    a, b = new("A", 9), new("B", 6)
    manager.allocate_slots(a, 9)
    manager.cache_blocks(a, 9)
    manager.allocate_slots(b, 6, manager.get_computed_blocks(b))
    tables, pool = axes(), axes()
    drawing.block_tables(tables, [a, b])
    drawing.block_pool(pool, manager.pool, [a, b])
    assert texts(tables) == [str(block) for seq in (a, b) for block in seq.block_table]
    assert a.block_table[0] == b.block_table[0]                    # shared, so its positions stand twice
    assert sorted(filter(None, texts(pool))) == sorted(str(p) for n in (9, 6) for p in range(n))
    assert colors(pool).count(drawing.OWNERS[0]) == 9 and colors(pool).count(drawing.OWNERS[1]) == 6


def test_equal_hashes_have_one_colour_and_others_another():
    manager = KVCacheManager(6, 2)
    a, b = new("A", 4), new("B", 4)
    b.prompt_token_ids[3] = 99
    for seq in (a, b): manager.full_block(seq, 1)
    ax = axes()
    drawing.hash_chain(ax, [a, b], 2)
    first_a, second_a, first_b, second_b = colors(ax)
    assert first_a == first_b and len({first_a, second_a, second_b}) == 3


def test_queue_mask_tiles_shards_and_timeline_draw_what_they_are_given():
    queue, mask, tiles, shards, time = axes(), axes(), axes(), axes(), axes()
    drawing.free_queue(queue, [3, 1], {1}.__contains__)
    assert texts(queue) == ["3", "1"] and colors(queue) == ["none", drawing.COLORS["cached"]]
    drawing.mask(mask, [[True, False], [True, True]], "ab", "xy")
    assert [c != "none" for c in colors(mask)] == [True, False, True, True]
    drawing.tiles(tiles, (4, 6), (2, 3), lambda row, column: drawing.COLORS["decode"] if column <= row else "none")
    assert [c != "none" for c in colors(tiles)] == [True, False, True, False]
    drawing.shards(shards, 0, (4, 2), [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(0, 2))], "w")
    assert texts(shards) == ["rank 0", "rank 1", "w\n4 x 2"]
    drawing.timeline(time, dict(host=[(0, 2, "x")], device=[(2, 5, "y")]), dict(host="#e69f00", device="#56a0d3"))
    assert texts(time) == ["x", "y"] and time.get_xlim() == (0, 5)


def test_no_text_in_a_coloured_box_is_grey():
    ax = axes()
    drawing.box(ax, 0, 0, "in colour", drawing.COLORS["prompt"])
    drawing.box(ax, 0, 1, "on the page")
    assert [t.get_color() for t in ax.texts] == [drawing.INK, drawing.GREY]


def test_a_wrong_prediction_of_a_schedule_is_drawn_in_the_message():
    from solutions.checks import WrongAnswer, scheduler
    with pytest.raises(WrongAnswer) as told: scheduler.check_prediction([dict(A=8), dict(A=1, B=1, C=1)])
    assert str(told.value).endswith("a column for each step:\nA  8 1\nB  . 1\nC  . 1")


# ---- how figures are stored

def pictures():
    return [(f"{c.name}, cell {i}", cell, output["data"]) for c in chapters() for i, cell in enumerate(c.cells)
            for output in cell.outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]


def test_every_picture_is_a_small_svg_without_a_background_and_with_a_title():
    problems = []
    for where, cell, data in pictures():
        svg = "".join(data.get(SVG, ""))
        alt = cell.options.get("fig-alt") or cell.options.get("fig-cap", "")
        if not svg: problems.append(f"{where} is no SVG: execute it with tools/run_notebooks.py --figures")
        elif len(svg) > 150_000: problems.append(f"{where} has {len(svg):,} bytes: pass rasterized=True to what is dense")
        elif f"<title>{escape(alt)}</title>" not in svg: problems.append(f"{where} has another title than its fig-alt")
        elif re.search(r'id="patch_1">\s*<path [^>]*style="fill: #', svg): problems.append(f"{where} has a background")
    if problems: pytest.fail("\n".join(problems), pytrace=False)


def test_an_svg_gets_a_title_and_loses_what_changes_between_runs():
    raw = '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="1">\n <metadata>now</metadata>\n <!-- 3 -->\n <g/>\n</svg>\n'
    svg = run_notebooks.with_title(raw, "a < b")
    assert svg == '<svg width="1" role="img">\n <title>a &lt; b</title>\n <g/>\n</svg>\n'


def test_the_style_has_no_background_and_readable_greys():
    style = matplotlib.rc_params_from_file(ROOT/"nbs/matplotlibrc", use_default_template=False)
    assert {style[key] for key in ("figure.facecolor", "axes.facecolor", "savefig.facecolor")} == {"none"}
    greys = {style[key] for key in style if key.endswith("color") and style[key] not in ("none",)}
    assert {g if g.startswith("#") else f"#{g}" for g in greys} == {drawing.GREY, "#78808a"}


def test_labs_and_figures_use_the_same_colours():
    css = (ROOT/"nbs/labs/lab.css").read_text()
    light = css[:css.index("@media")]
    for kind in ("prompt", "decode", "cached", "lost", "bound"): assert f"--{kind}: {drawing.COLORS[kind]};" in light


# ---- the exercises

ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


@right(exercises.check_owner_of_slot)
def by_lookup(tables, slot, block_size):
    held = {table[p // block_size]*block_size + p % block_size: (name, p) for name, (table, n) in tables.items() for p in range(n)}
    return held.get(slot)


@wrong(exercises.check_owner_of_slot, "the text ends before this slot")
def without_end(tables, slot, block_size):
    for name, (table, _) in tables.items():
        if slot // block_size in table: return name, table.index(slot // block_size)*block_size + slot % block_size


@wrong(exercises.check_owner_of_slot, "gives ('A', 8), expected ('A', 0)")
def without_table(tables, slot, block_size):
    for name, (table, _) in tables.items():
        if slot // block_size in table: return name, slot


@right(exercises.check_busy)
def by_steps(spans, start, end):
    edges = sorted({start, end, *(min(max(e, start), end) for span in spans for e in span)})
    return sum(b - a for a, b in zip(edges, edges[1:]) if any(s <= a and b <= e for s, e in spans)) / (end - start)


wrong(exercises.check_busy, "only what lies between start and end counts")(lambda spans, start, end: sum(e - b for b, e in spans) / (end - start))
wrong(exercises.check_busy, "the span is over before")(
    lambda spans, start, end: sum(min(e, end) - max(b, start) for b, e in spans) / (end - start))

right(exercises.check_visible_pairs)(lambda q, k, window=None: sum(min(k - i, window or k) for i in range(q)))
wrong(exercises.check_visible_pairs, "the diagonal counts, too")(lambda q, k, window=None: sum(min(k - i - 1, window or k) for i in range(q)))
wrong(exercises.check_visible_pairs, "(3, 7, 3) gives 18, expected 9")(lambda q, k, window=None: sum(k - i for i in range(q)))


@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(checks_of([exercises]), ANSWERS)
