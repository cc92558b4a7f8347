"""A web page for closed-loop drawing on this machine: a prompt goes in, rounds appear as they are drawn.

It listens on 127.0.0.1 alone and loads nothing from elsewhere. Needs `pip install -e '.[web]'`.
"""

import logging
import socket
from importlib.util import find_spec

import transformers
from omegaconf import DictConfig

from recipes._build import build_budget, build_controller, build_loop
from recipes._recipe import recipe, run_folder

logger = logging.getLogger(__name__)


@recipe("serve_closed_loop")
def main(cfg: DictConfig) -> None:
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise ValueError("the web page needs more packages: pip install -e '.[web]'")
    import uvicorn

    from clvr_train.inference.web import HOST, Desk, make_app

    budget = build_budget(cfg)
    run_folder(cfg)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Before the models: a port that is taken is known at once.
    with socket.create_server((HOST, cfg.port)) as listening:
        loop = build_loop(cfg, build_controller(cfg.controller))
        with Desk(loop, active=cfg.active) as desk:
            options = {"log_config": None, "access_log": False, "ws": "none", "lifespan": "off"}
            server = uvicorn.Server(uvicorn.Config(make_app(desk, budget), timeout_graceful_shutdown=1, **options))
            logger.info("open http://%s:%d", *listening.getsockname())
            server.run(sockets=[listening])


if __name__ == "__main__":
    main()
