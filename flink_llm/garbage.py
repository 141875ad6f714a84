"""Python's garbage collector in a process that many calls share: a full collection stops them all.

What has lived since the start is looked at no more, and the rest less often: with some hundred thousand objects
a collection takes a tenth of a second and more, and by default it comes every few seconds under load.
"""

import gc

COLLECT_AT = 50_000, 20, 50
"""Objects more than there were before the youngest are looked at for cycles (700 by default), and how often the older
ones are: calls in flight come and go by the thousand."""


def spare() -> None:
    """From now on, in this process: what there is now is taken to stay. May be called again once more has come."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AT)
