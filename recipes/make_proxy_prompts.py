"""Offline teacher: a judgeable proxy prompt for every step of every trajectory, stored beside them (CLVR 3.2).

Writes <data.folder>/{proxy_prompts.jsonl, rejected.jsonl}. What this teacher has answered before is not asked again: to
go on, run the same command again.
"""

import logging
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from clvr_train.data.refusals import Refusals
from clvr_train.proxy.prompts import write_proxy_prompts
from clvr_train.runtime.process import own_folder
from clvr_train.services.chat import ChatClient
from recipes._data import read_folder, truncated
from recipes._recipe import recipe
from recipes._services import build_teacher

logger = logging.getLogger(__name__)


@recipe("make_proxy_prompts")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.data.folder)
    refusals = Refusals(folder, cfg.data.max_refused)
    samples = truncated(read_folder(folder, refusals, decode=False), folder)
    own_folder(folder)
    with ExitStack() as stack:
        teacher, client = build_teacher(cfg.teacher, stack)
        bar = stack.enter_context(tqdm(total=len(samples), desc="make_proxy_prompts"))

        def answered() -> None:
            bar.update()
            if client:
                bar.set_postfix_str(_cost(client), refresh=False)

        workers = client.options.limit if client else 0
        written, rejected = write_proxy_prompts(teacher, samples, folder, workers=workers, answered=answered)
    logger.info("%d proxy prompts, %d contexts rejected, in %s", written, rejected, folder)
    if client:
        logger.info("%d requests: %s", client.counts["requests"], _cost(client))


def _cost(client: ChatClient) -> str:
    counts = client.counts
    return f"{counts['tokens_in']} tokens in, {counts['tokens_out']} out, {counts['cost_usd']:.2f} USD"


if __name__ == "__main__":
    main()
