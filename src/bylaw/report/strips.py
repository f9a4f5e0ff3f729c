"""Small drawings that stand in a line or in a table's cell. They stretch with their place, and say in words what they
show only where no number beside them does.
"""

from collections.abc import Sequence

from markupsafe import Markup

from bylaw.words import percent, visible

_HIDDEN = Markup('<svg class="{}" aria-hidden="true">{}</svg>')


def meter(share: float | None) -> Markup:
    """A bar of a share."""
    if share is None:
        return Markup("")
    full = min(max(share, 0.0), 1.0) * 100
    bars = '<rect class="track" width="100%" height="100%"/><rect class="fill" width="{:.1f}%" height="100%"/>'
    return _HIDDEN.format("meter", Markup(bars).format(full))


def lean(value: float | None, most: float) -> Markup:
    """A bar from the middle to the right where `value` is above 0, to the left below; `most` reaches the end."""
    if value is None:
        return Markup("")
    reach = min(abs(value) / (most or 1), 1.0) * 50
    bar = Markup('<rect x="{:.1f}%" width="{:.1f}%" y="5" height="8"/>').format(50 if value >= 0 else 50 - reach, reach)
    return _HIDDEN.format("lean", bar)


def balance(p_a: float, undecided: float) -> Markup:
    """Where a label lies between answer A, at the left, and B; within `undecided` of the middle it is neither's."""
    at = 100 * (1 - p_a)
    tone = "neither" if abs(at - 50) < 100 * undecided else "sure"
    parts = [
        '<line class="track" x1="0" x2="100%" y1="8" y2="8"/>',
        f'<rect class="band" x="{50 - 100 * undecided:.0f}%" width="{200 * undecided:.0f}%" y="4" height="8"/>',
        f'<rect class="{tone}" x="{min(at, 50):.1f}%" width="{abs(at - 50):.1f}%" y="6.5" height="3"/>',
        '<line class="middle" x1="50%" x2="50%" y1="2" y2="14"/>',
        f'<circle class="{tone}" cx="{at:.1f}%" cy="8" r="6"/>',
    ]
    return _HIDDEN.format("balance", Markup("".join(parts)))


def path(values: Sequence[tuple[str, float | None]]) -> Markup:
    """Shares from 0 to 1 on one line, from the first model to the last, which is drawn largest."""
    known = [(label, 100 * value) for label, value in values if value is not None]
    if not known:
        return Markup("")
    said = ", ".join(f"{visible(label)}: {percent(value / 100, 1)}" for label, value in known)
    places = [value for _, value in known]
    line = Markup('<line class="way" x1="{:.1f}%" x2="{:.1f}%" y1="8" y2="8"/>').format(places[0], places[-1])
    dots = [Markup('<circle class="stop" cx="{:.1f}%" cy="8" r="4"/>').format(value) for value in places[:-1]]
    dots.append(Markup('<circle class="end" cx="{:.1f}%" cy="8" r="5.5"/>').format(places[-1]))
    track = Markup('<line class="track" x1="0" x2="100%" y1="8" y2="8"/>')
    shape = Markup('<svg class="path" role="img" aria-label="{}">{}</svg>')
    return shape.format(said, track + line + Markup("").join(dots))
