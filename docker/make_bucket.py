"""Make the bucket of that name, when the store answers; one that is there already is fine."""

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

SECONDS = 120

client, name = boto3.client("s3"), sys.argv[1]
deadline = time.monotonic() + SECONDS
while True:
    try:
        if name not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=name)
        break
    except (BotoCoreError, ClientError) as error:
        if time.monotonic() > deadline:
            sys.exit(f"{client.meta.endpoint_url} gives no bucket {name} after {SECONDS} s: {error}")
        time.sleep(2)
