#!/usr/bin/env bash
# obstore cannot list a bucket that has a key with an empty, `.` or `..` segment, or a control character.
#
# Version:  obstore 0.12.1, on moto 5.2.5 (server); boto3 1.43.117 writes the key.
# Seen:     `a//b` is a valid key of S3. One object with it makes each listing whose page has it raise InvalidPathError:
#           list(), list() with a prefix, an offset before it or a chunk size of 1, and list_with_delimiter(). Objects
#           in the same page are not returned either, and no option makes the page smaller: `?max-keys=1` in the endpoint
#           is dropped. An offset after it works.
# Expected: the other objects are listed, or the key is returned as it is.
# Matters:  whoever can upload one such key stops every listing and reconciliation of the bucket.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "obstore==0.12.1" "moto[server]==5.2.5" "boto3==1.43.117"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import boto3
import obstore
from moto.server import ThreadedMotoServer
from obstore.exceptions import InvalidPathError
from obstore.store import S3Store

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
url = f"http://{host}:{port}"
secrets = {"access_key_id": "test", "secret_access_key": "test"}
client = boto3.client(
    "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
)
client.create_bucket(Bucket="bucket-1")
for key in ("a", "a//b", "c"):
    client.put_object(Bucket="bucket-1", Key=key, Body=b"1")
store = S3Store("bucket-1", endpoint=url, region="us-east-1", client_options={"allow_http": True}, **secrets)


def outcome(listing):
    try:
        return [each["path"] for each in listing()]
    except InvalidPathError:
        return "InvalidPathError"


seen = {
    "list": outcome(lambda: obstore.list(store).collect()),
    "with a prefix": outcome(lambda: obstore.list(store, "a").collect()),
    "in chunks of 1": outcome(lambda: [each for page in obstore.list(store, chunk_size=1) for each in page]),
    "with a delimiter": outcome(lambda: obstore.list_with_delimiter(store, "a")["objects"]),
    "after the key": outcome(lambda: obstore.list(store, offset="b").collect()),
}
print(seen)
server.stop()
expected = {name: "InvalidPathError" for name in seen} | {"after the key": ["c"]}
sys.exit(seen != expected)
PYTHON
