"""The command-line arguments of `trainer account`, `keys`, `quota`, `usage` and `audit`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trainer.commands import dispatch

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_account_commands(commands: _Commands) -> None:
    """Add the commands that open the store."""
    account = _group(commands, "account", "accounts of a server: create, list, disable, enable")
    for name, text in (
        ("create", "add an account"),
        ("disable", "refuse all of its keys"),
        ("enable", "accept them again"),
    ):
        _action(account, name, text).add_argument("name", metavar="ACCOUNT")
    _json(_action(account, "list", "all accounts"))

    keys = _group(commands, "keys", "API keys: create, list, revoke, rotate")
    create = _action(keys, "create", "make a key and print it, once")
    create.add_argument("account", metavar="ACCOUNT", help="its owner")
    create.add_argument(
        "--scope", action="append", metavar="SCOPE", help="inference (default), training, admin, metrics"
    )
    create.add_argument("--expires", metavar="TIME", help="lifetime, for example 90d; without end when left out")
    create.add_argument("--note", default="", metavar="TEXT", help="for people")
    listing = _action(keys, "list", "all keys, without their secrets")
    listing.add_argument("account", nargs="?", metavar="ACCOUNT", help="only its keys")
    _json(listing)
    _action(keys, "revoke", "refuse a key").add_argument("key", metavar="ID")
    rotate = _action(keys, "rotate", "replace a key by a new one, printed once")
    rotate.add_argument("key", metavar="ID")
    rotate.add_argument("--grace", default="0s", metavar="TIME", help="how long the old key stays valid")

    quota = _group(commands, "quota", "limits of an account: set, get")
    change = _action(quota, "set", "set limits; an empty value removes one")
    change.add_argument("account", metavar="ACCOUNT")
    change.add_argument(
        "limits", nargs="+", metavar="LIMIT=VALUE", help="for example requests_per_minute=60 credit=+10"
    )
    change.add_argument("--model", default="*", metavar="MODEL", help="only for this model; all together when left out")
    shown = _action(quota, "get", "limits and what is used of them")
    shown.add_argument("account", metavar="ACCOUNT")
    _json(shown)

    usage = commands.add_parser("usage", help="what accounts used: tokens, device time, cost")
    usage.add_argument("account", nargs="?", metavar="ACCOUNT", help="only this one")
    usage.add_argument("--by", default="account,model", metavar="NAMES", help="of account, model, addon, day")
    usage.add_argument("--since", metavar="DAY", help="from this day on, for example 2026-11-26 (UTC)")
    _store(usage)
    _json(usage)
    usage.set_defaults(run=dispatch.usage)

    audit = _group(commands, "audit", "the log of control actions: list, export, verify, prune")
    listed = _action(audit, "list", "the newest entries")
    listed.add_argument("--last", type=int, default=50, metavar="N", help="number of entries")
    _action(audit, "export", "all entries as JSONL").add_argument("--out", metavar="FILE", help="not standard output")
    verify = _action(audit, "verify", "recompute the chain of hashes, and print its end")
    verify.add_argument("--contains", metavar="NUMBER:HASH", help="an end that was noted earlier")
    prune = _action(audit, "prune", "remove old entries, which is recorded")
    prune.add_argument("--keep", required=True, metavar="TIME", help="age of the oldest entry that stays, as 400d")


def _group(commands: _Commands, name: str, text: str) -> _Commands:
    parser = commands.add_parser(name, help=text)
    parser.set_defaults(run=getattr(dispatch, name))
    return parser.add_subparsers(required=True, dest="action", metavar="ACTION")


def _action(group: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=text, description=text)
    _store(parser)
    return parser


def _store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", metavar="URL", help="sqlite:///FILE or postgresql://...; TRAINER_STORE; runs/.control"
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
