#!/usr/bin/env bash
# botocore's retry mode `adaptive` slows a client that sends few requests to about one a second after a single 503.
#
# Version:  botocore 1.43.117.
# Seen:     against a local server that answers 503 SlowDown once and 200 from then on, ten PUTs one after the other
#           take several seconds; in mode `standard` the same ten take well under two.
# Matters:  its token bucket starts from the rate measured so far, which is low for a client that sends one request
#           at a time. A batch job with few requests is throttled although the server is ready.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "botocore==1.43.117"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import botocore.session
from botocore.config import Config


def seconds(mode: str) -> float:
    refused = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = b""
            if not refused:
                refused.append(True)
                self.send_response(503)
                body = b"<Error><Code>SlowDown</Code></Error>"
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=f"http://127.0.0.1:{server.server_port}", region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
        config=Config(
            retries={"mode": mode, "total_max_attempts": 4}, s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
        ),
    )
    begin = time.monotonic()
    for number in range(10):
        client.put_object(Bucket="bucket-1", Key=str(number), Body=b"body")
    server.shutdown()
    return time.monotonic() - begin


standard, adaptive = seconds("standard"), seconds("adaptive")
print(f"standard {standard:.1f} s, adaptive {adaptive:.1f} s")
assert standard < 2.0 and adaptive > 3.0, "the behaviour has changed"
PYTHON
echo "as described"
