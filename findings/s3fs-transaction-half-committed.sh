#!/usr/bin/env bash
# A transaction of s3fs commits some of its files when the completion of one of them fails.
#
# Version:  s3fs 2026.9.0 (fsspec's `with fs.transaction`), against a server on moto 5.2.5.
# Seen:     two files are written inside the block, and the bucket of the second one is gone at its end. The block
#           raises, and the first file stays in the bucket.  `pipe_file` inside the block writes at once, so its
#           object stays also if the block fails.
# Matters:  "the files of a transaction appear together or not at all" does not hold for object stores there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "moto[server]==5.2.5" "s3fs==2026.9.0"
cd "$folder"
"$folder/venv/bin/python" - 2>server.log <<'PYTHON'
import botocore.session
import s3fs
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
fs = s3fs.S3FileSystem(
    key="test", secret="test", endpoint_url=f"http://{host}:{port}", skip_instance_cache=True,
    use_listings_cache=False, client_kwargs={"region_name": "us-east-1"},
)
plain = botocore.session.get_session().create_client(
    "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
    aws_access_key_id="test", aws_secret_access_key="test",
)
plain.create_bucket(Bucket="bucket-1")
plain.create_bucket(Bucket="bucket-2")
raised = ""
try:
    with fs.transaction:
        with fs.open("bucket-1/first", "wb") as file:
            file.write(b"1")
        with fs.open("bucket-2/second", "wb") as file:
            file.write(b"2")

        plain.delete_bucket(Bucket="bucket-2")
except Exception as error:
    raised = type(error).__name__
left = fs.ls("bucket-1", refresh=True)
try:
    with fs.transaction:
        fs.pipe_file("bucket-1/piped", b"3")
        raise RuntimeError("the block fails")
except RuntimeError:
    pass
piped = fs.exists("bucket-1/piped")
server.stop()
print(raised, left, piped)
assert raised and left == ["bucket-1/first"] and piped, "the behaviour has changed"
PYTHON
echo "as described"
