"""An S3 server to try things on: moto's, with the buckets that you name, until Ctrl-C.

```bash
uv run examples/s3_server.py letters
```
"""

from __future__ import annotations

import sys
import threading
from urllib.request import Request, urlopen

from fennflow.testing import moto_server

PORT = 9000

if __name__ == "__main__":
    with moto_server(port=PORT) as server:
        for bucket in sys.argv[1:]:
            urlopen(Request(f"{server.url}/{bucket}", method="PUT")).close()
        print(f"Serving {', '.join(sys.argv[1:])}. To use it:")
        print(f"export AWS_ENDPOINT_URL={server.url} AWS_DEFAULT_REGION=us-east-1")
        print(f"export AWS_ACCESS_KEY_ID={server.access_key}", end=" ")
        print(f"AWS_SECRET_ACCESS_KEY={server.secret_key}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped; the files are gone.")
