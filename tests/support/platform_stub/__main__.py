import argparse
import signal
from contextlib import suppress

from tests.support.platform_stub.platform import ENDPOINT
from tests.support.platform_stub.server import serving


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.platform_stub", description="A local RunPod: point curl or Postman at it."
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key", default="local", help="the API key that clients must send")
    arguments = parser.parse_args()
    # SIGTERM ends the workers too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), serving(arguments.port, key=arguments.key) as platform:
        for _ in range(arguments.workers):
            platform.start_worker()
        print(
            f"serving {platform.url}/v2/{ENDPOINT}/run with the key {arguments.key!r}, for example:\n"
            f"  curl {platform.url}/v2/{ENDPOINT}/runsync -H 'Authorization: Bearer {arguments.key}' "
            """-d '{"input": {"prompt": "the ocean at dusk"}}'""",
            flush=True,
        )
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
