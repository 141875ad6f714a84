"""Which texts an encoder runs together next: decisions only, no clock and no model.

A run costs what it is padded to: rows times its longest text. Runs are made of similar lengths, so that
little of that is padding, and nothing is waited for: what is there is run. The shortest go first, many of
them in a run, as long as nobody has been overtaken for longer than `ceiling_s`; from then on the oldest
text is in every next run. So a text waits at most that long for such as came later, and a long one never
starves.
"""

from collections.abc import Sequence

from msgspec import Struct


class Limits(Struct, frozen=True, kw_only=True):
    """Of a run.

    At most `rows` texts and `padded_tokens` tokens, padding included; a text that is longer is run alone.
    Of those at most `padding`, a share, is padding, or `free_tokens` where that is more: a run has a cost of
    its own, so a few short texts are not run one by one. `ceiling_s`: seconds until nothing that came
    later goes before a text. Only the oldest `window` texts are looked at, which bounds what a decision costs.
    """

    rows: int = 64
    padded_tokens: int = 4096
    padding: float = 0.25
    free_tokens: int = 64
    ceiling_s: float = 0.05
    window: int = 512


LIMITS = {"cpu": Limits(rows=24, padding=0.04), "cuda": Limits()}
"""By device. A CPU gains nothing by more rows, whose activations leave its caches, and pays for all padding."""


def next_run(lengths: Sequence[int], oldest_s: float, limits: Limits) -> list[int]:
    """Indices of the texts to run now, in order; never none of some.

    `lengths` are the tokens of those that wait, in the order in which they are due; the first has waited for
    `oldest_s` seconds.
    """
    lengths = lengths[: limits.window]
    if not lengths:
        return []
    first = 0 if oldest_s >= limits.ceiling_s else min(range(len(lengths)), key=lengths.__getitem__)
    chosen: list[int] = []
    longest = total = 0
    for i in sorted(range(len(lengths)), key=lambda i: (i != first, abs(lengths[i] - lengths[first]))):
        if len(chosen) == limits.rows:
            break
        padded = (len(chosen) + 1) * max(longest, lengths[i])
        waste = padded - total - lengths[i]
        fits = padded <= limits.padded_tokens and waste <= max(limits.free_tokens, limits.padding * padded)
        if fits or i == first:
            chosen.append(i)
            longest = max(longest, lengths[i])
            total += lengths[i]
    return sorted(chosen)
