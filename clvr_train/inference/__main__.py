"""Draws goals from the command line: python -m clvr_train.inference --model F --controller F --out F "a red circle"."""

import argparse
import sys
from pathlib import Path

from clvr_train.data.sharegpt import write_trajectories
from clvr_train.inference.closed_loop import Budget
from clvr_train.inference.loop import ClosedLoop


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser("python -m clvr_train.inference", description="Draws goals in closed loop.")
    parser.add_argument("goals", nargs="+", help="what to draw, a text each")
    parser.add_argument("--model", required=True, help="diffusers folder of a FLUX.2 Klein")
    parser.add_argument(
        "--controller", required=True, help="transformers folder of a Qwen3-VL, or URL of a chat server"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for trajectories.jsonl and images/")
    parser.add_argument("--controller-name", help="the name under which the chat server knows it")
    parser.add_argument("--key-env", help="the environment variable that holds the chat server's key")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", default="fp32", help="fp32 (default) or bf16")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar="PX", help="height and width drawn")
    parser.add_argument("--window", type=int, default=512, help="tokens of the text encoder's window")
    parser.add_argument("--layers", type=int, nargs="+", default=(9, 18, 27), help="hidden states of the condition")
    parser.add_argument("--seed", type=int, default=0, help="noise of the images")
    for name in Budget.__dataclass_fields__:
        kind = float if name == "max_seconds" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(Budget, name), help="see Budget")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Writes the trajectories and says, a line a goal, what became of it; 1 after an error, which is one line."""
    args = make_parser().parse_args(arguments)
    options = {"size_px": tuple(args.size), "window": args.window, "layers": args.layers, "seed": args.seed}
    options |= {"device": args.device, "precision": args.precision}
    options |= {"name": args.controller_name, **({"key_env": args.key_env} if args.key_env else {})}
    try:
        loop = ClosedLoop.load(args.model, args.controller, **options)
        results = loop.many(args.goals, **{name: getattr(args, name) for name in Budget.__dataclass_fields__})
        drawn = [result.trajectory for result in results if result.trajectory is not None]
        facts = {f"goal-{n:04d}": {"closed_loop": result.facts()} for n, result in enumerate(results, start=1)}
        write_trajectories(args.out, drawn, facts)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for goal, result in zip(args.goals, results, strict=True):
        sys.stdout.write("{}: {stop_reason}, {images} images, {nfe} NFEs, {seconds} s\n".format(goal, **result.facts()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
