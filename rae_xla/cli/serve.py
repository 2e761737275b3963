"""``rae-xla serve``: a page in the browser that generates images."""

from __future__ import annotations

import argparse
import signal

from rae_xla.cli.options import NumberAction, PathAction
from rae_xla.cli.prompt_options import add_text_to_image
from rae_xla.config.paths import LOCAL_OR_HUB, PathRule
from rae_xla.config.ranges import Range
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model",
        action=PathAction,
        rule=PathRule(hub=True),
        required=True,
        metavar="MODEL",
        help="what `rae-xla generate` takes: a published name, a results folder, a saved folder",
    )
    parser.add_argument(
        "--rae",
        action=PathAction,
        rule=LOCAL_OR_HUB,
        metavar="MODEL",
        help="autoencoder of a saved model (default: its subfolder rae)",
    )
    parser.add_argument(
        "--port",
        action=NumberAction,
        accepted=Range(least=0, most=65_535),
        type=int,
        default=8000,
        metavar="N",
        help="0: any free one (default: 8000)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help="visitors must add ?token=TEXT to the address; required beyond this machine",
    )
    add_text_to_image(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the model")


def run(args: argparse.Namespace) -> int:
    """Serve the page until the command is interrupted."""
    from rae_xla.tools.serve.server import check_host

    check_host(args.host, args.token)

    from rae_xla.sample.pipeline import load_pipeline
    from rae_xla.tools.serve.jobs import Jobs
    from rae_xla.tools.serve.models import served_model
    from rae_xla.tools.serve.server import make_server

    pipeline = load_pipeline(
        args.model,
        rae=args.rae,
        overrides=args.overrides,
        tokenizer=args.tokenizer,
        request=args.request,
        write_text=args.write_text,
    )
    if pipeline.sampler.backend.process_count > 1:
        raise UserError("serve runs in one process: start it without torchrun")
    model = served_model(str(args.model), pipeline)
    jobs = Jobs(model.generate, model.check, model.settings)
    server = make_server(args.host, args.port, model, jobs, args.token)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{server.server_address[1]}  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        jobs.close()
    return 0
