#!/usr/bin/env bash
# moto's S3 server lets several creates with `If-None-Match: *` of one key succeed if they arrive at the same time.
#
# Version:  moto 5.2.5 (server), boto3 1.43.117 as the client.
# Seen:     of eight PutObject requests with `If-None-Match: *` that arrive together, now and then two or more are answered 200;
#           the last one replaces the others. The server looks for the key first and stores the object later.
# Expected: AWS documents that the first one to finish succeeds, and that the others get 412 PreconditionFailed
#           (conditional writes, "Racing" writes).
# Matters:  locks, leases and logs that are built on conditional creation work on moto with one writer, and split with several.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "moto[server]==5.2.5" "boto3==1.43.117"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import threading
from concurrent.futures import ThreadPoolExecutor

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

AT_ONCE, ROUNDS = 8, 1000
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
client = boto3.client(
    "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
    aws_access_key_id="test", aws_secret_access_key="test",
    config=Config(max_pool_connections=AT_ONCE, retries={"total_max_attempts": 1}),
)
client.create_bucket(Bucket="bucket-1")
together = threading.Barrier(AT_ONCE)


def create(key, number):
    together.wait()
    try:
        client.put_object(Bucket="bucket-1", Key=key, Body=b"%d" % number * 100_000, IfNoneMatch="*")
    except ClientError:
        return 0  # 412, and sometimes 500
    return 1


with ThreadPoolExecutor(AT_ONCE) as pool:
    for turn in range(ROUNDS):
        created = sum(pool.map(create, [f"key-{turn}"] * AT_ONCE, range(AT_ONCE)))
        if created > 1:
            break
server.stop()
print(f"in round {turn + 1}, {created} of {AT_ONCE} creates of one key succeeded")
assert created > 1, "the behaviour has changed"
PYTHON
echo "as described"
