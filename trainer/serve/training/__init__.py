"""The gateway's side of the training API: `/api/v1` of the tinker client, in front of an executor. No torch."""
