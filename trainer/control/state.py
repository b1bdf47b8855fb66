"""The first account and its key; who acts on this machine."""

from __future__ import annotations

import getpass
import os
import socket

from trainer.control.accounts import create_account, list_accounts
from trainer.control.audit import Actor
from trainer.control.keys import create_key, has_admin
from trainer.control.store import Store

FIRST_ACCOUNT = "admin"


def first_admin_key(store: Store) -> str | None:
    """Make an account `admin` and a key for it, where no valid admin key exists; None where one does."""
    if has_admin(store):
        return None
    actor = local_actor()
    known = {account.name: account for account in list_accounts(store)}
    name = FIRST_ACCOUNT
    while name in known and known[name].is_disabled:
        name += "-again"
    if name not in known:
        create_account(store, actor, name)
    return create_key(store, actor, name, {"admin"}, note="first admin key")


def local_actor() -> Actor:
    """Who runs a command on this machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return Actor(f"cli {user}@{socket.gethostname()}")
