"""What becomes of an epoch whose judges are away: its rollouts wait for them."""

import logging
import time
from collections.abc import Callable, Sequence

from clvr_train.pprl.rollout import Group, RewardFunction, judge_missing, missing_share
from clvr_train.runtime.distributed import World

logger = logging.getLogger(__name__)
MAX_TRIES = 3


def wait_for_scores(
    groups: Sequence[Group],
    reward: RewardFunction,
    *,
    max_missing: float,
    healthy: Callable[[], bool],
    save: Callable[[], None],
    ended: Callable[[], bool],
    wait_s: float = 30.0,
    workers: int = 0,
    world: World | None = None,
    unusable: Callable[[], float] | None = None,
) -> bool:
    """Returns once no more than a share `max_missing` of the rollouts lack a score; False if the run is to end first.
    `groups` are those of this rank; all ranks wait together.

    Otherwise `save` is called, once. Whenever the judges are healthy again, what is missing is judged again; between
    two looks at them lie `wait_s` seconds. A run that is ended meanwhile goes on with the same rollouts, from the
    ledger or drawn again, and what was judged of them comes from there, or from the cache of replies.

    Args:
        unusable: how many replies so far were no scores: a try in which no more came up than before says nothing
            against the judges, who were away again. None: every try counts.

    Raises:
        ValueError: judges that are healthy have given no better scores `MAX_TRIES` times.
    """
    world = world or World()
    tries, waited = 0, False
    while (share := missing_share(groups, world)) > max_missing:
        own = next((score.reason for group in groups for score in group.scores if score.missing), "")
        reason = next(filter(None, world.gather(own)))
        if not waited:
            logger.warning("%.3g of the scores are missing (%s); waiting for the judges", share, reason)
            save()
        if tries == MAX_TRIES:
            raise ValueError(
                f"{100 * share:.0f} % of the scores are missing, more than max_missing={max_missing:g}, although the "
                f"judges answer: {reason}"
            )
        pause_s = wait_s if waited else 0.0
        while True:
            if any(world.gather(_sleep(pause_s, ended))):
                return False
            if all(world.gather(healthy())):
                break
            pause_s = wait_s
        before = unusable() if unusable else -1.0
        judge_missing(groups, reward, workers)
        waited = True
        tries += any(world.gather((unusable() if unusable else 0.0) > before))
    return True


def _sleep(seconds: float, ended: Callable[[], bool]) -> bool:
    """Sleeps, and returns early with True once the run is to end."""
    until = time.monotonic() + seconds
    while not ended() and time.monotonic() < until:
        time.sleep(min(max(0.0, until - time.monotonic()), 0.5))
    return ended()
