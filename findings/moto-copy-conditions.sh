#!/usr/bin/env bash
# moto's S3 server accepts conditions on CopyObject and per-key ETags in DeleteObjects, and ignores them.
#
# Version:  moto 5.2.5 (server), boto3 1.43.117 as the client.
# Seen:     a CopyObject with `x-amz-copy-source-if-match` of another ETag, one with `If-None-Match: *` onto an
#           existing key, and a DeleteObjects that names a wrong ETag are answered as successes and take effect.
# Expected: AWS documents 412 PreconditionFailed for each (CopyObject, DeleteObjects: API reference).
# Matters:  a test that passes on moto proves nothing about code that relies on these conditions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "moto[server]==5.2.5" "boto3==1.43.117"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import boto3
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
client = boto3.client(
    "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
    aws_access_key_id="test", aws_secret_access_key="test",
)
client.create_bucket(Bucket="bucket-1")
for key, body in (("a", b"1"), ("b", b"2"), ("c", b"3")):
    client.put_object(Bucket="bucket-1", Key=key, Body=body)
wrong = '"00000000000000000000000000000000"'


def outcome(call):
    try:
        return "200" if not call().get("Errors") else "error in the answer"
    except ClientError as error:
        return error.response["Error"]["Code"]


source = {"Bucket": "bucket-1", "Key": "a"}
seen = {
    "CopyObject CopySourceIfMatch": outcome(
        lambda: client.copy_object(Bucket="bucket-1", Key="d", CopySource=source, CopySourceIfMatch=wrong)
    ),
    "CopyObject IfNoneMatch": outcome(
        lambda: client.copy_object(Bucket="bucket-1", Key="b", CopySource=source, IfNoneMatch="*")
    ),
    "DeleteObjects ETag": outcome(
        lambda: client.delete_objects(
            Bucket="bucket-1", Delete={"Objects": [{"Key": "c", "ETag": wrong}]}
        )
    ),
}
left = sorted(each["Key"] for each in client.list_objects_v2(Bucket="bucket-1")["Contents"])
body = client.get_object(Bucket="bucket-1", Key="b")["Body"].read()
server.stop()
print(seen, left, body)
assert set(seen.values()) == {"200"} and left == ["a", "b", "d"] and body == b"1", "the behaviour has changed"
PYTHON
echo "as described"
