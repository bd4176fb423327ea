"""What a user may pass to S3 as `connector_extra`, in the words of PutObject.

Customer keys (SSE-C) are not among them: every read would need them, and the journal would keep
them.
"""

from __future__ import annotations

NOT_COPIED = frozenset(
    {
        "ACL",
        "BucketKeyEnabled",
        "ExpectedBucketOwner",
        "GrantFullControl",
        "GrantRead",
        "GrantReadACP",
        "GrantWriteACP",
        "ObjectLockLegalHoldStatus",
        "ObjectLockMode",
        "ObjectLockRetainUntilDate",
        "RequestPayer",
        "SSEKMSEncryptionContext",
        "SSEKMSKeyId",
        "ServerSideEncryption",
        "StorageClass",
        "WebsiteRedirectLocation",
    }
)
"""What CopyObject does not take over from its source, so that apply has to name it again."""

HEADERS = frozenset(
    {"CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "Expires"}
)
"""What CopyObject takes over, unless it gives the target metadata of its own."""

FOR_PUT = NOT_COPIED | HEADERS | {"Tagging"}
