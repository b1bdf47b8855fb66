"""`trainer account`, `keys`, `quota`, `usage` and `audit`: read and change the store of a server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.tables import table_lines
from trainer.control.durations import seconds_of
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.run.console import tell

if TYPE_CHECKING:
    from trainer.control.store import Store


def account(arguments: argparse.Namespace) -> int:
    """Run `trainer account`."""
    store = _open(arguments)
    from trainer.control.accounts import create_account, list_accounts, set_disabled
    from trainer.control.state import local_actor

    match arguments.action:
        case "create":
            create_account(store, local_actor(), arguments.name)
            tell(f"account {arguments.name}; next: trainer keys create {arguments.name}")
        case "list":
            found = list_accounts(store)
            rows = [
                (each.name, "disabled" if each.is_disabled else "", str(each.num_keys), _day(each.created))
                for each in found
            ]
            _show(arguments, [asdict(each) for each in found], ("account", "", "keys", "created"), rows)
        case action:
            set_disabled(store, local_actor(), arguments.name, is_disabled=action == "disable")
    return 0


def keys(arguments: argparse.Namespace) -> int:
    """Run `trainer keys`."""
    store = _open(arguments)
    from trainer.control.keys import create_key, list_keys, revoke_key, rotate_key
    from trainer.control.state import local_actor

    match arguments.action:
        case "create":
            lifetime = None if arguments.expires is None else seconds_of(arguments.expires, "--expires")
            scopes = arguments.scope or ["inference"]
            key = create_key(store, local_actor(), arguments.account, scopes, expires_s=lifetime, note=arguments.note)
            _print_key(key)
        case "rotate":
            _print_key(rotate_key(store, local_actor(), arguments.key, grace_s=seconds_of(arguments.grace, "--grace")))
        case "revoke":
            revoke_key(store, local_actor(), arguments.key)
            tell("revoked; running servers refuse it within 2 s")
        case _:
            found = list_keys(store, arguments.account)
            now = datetime.now(UTC).timestamp()
            rows = [
                (key.id, key.account, ",".join(sorted(key.scopes)), key.problem(now) or "", _day(key.expires), key.note)
                for key in found
            ]
            documents = [asdict(key) | {"scopes": sorted(key.scopes), "problem": key.problem(now)} for key in found]
            _show(arguments, documents, ("id", "account", "scopes", "", "expires", "note"), rows)
    return 0


def quota(arguments: argparse.Namespace) -> int:
    """Run `trainer quota`."""
    store = _open(arguments)
    from trainer.control.quotas import quotas_of, set_quota
    from trainer.control.state import local_actor
    from trainer.control.usage import device_seconds, spent, today, trained

    if arguments.action == "set":
        changes: dict[str, str | None] = {}
        for given in arguments.limits:
            name, separator, value = given.partition("=")
            if not separator:
                raise UserError(f"{given}: write LIMIT=VALUE")
            changes[name] = value or None
        set_quota(store, local_actor(), arguments.account, changes, model=arguments.model)
        return 0
    from trainer.control.prices import amount

    used = {
        "credit": amount(spent(store, arguments.account)),
        "device_hours": f"{device_seconds(store, arguments.account) / 3600:.4f}",
        "training_tokens_per_day": str(trained(store, arguments.account, today())),
    }
    found = quotas_of(store, arguments.account)
    rows = [(each.limit, each.model, each.shown, used.get(each.limit, "")) for each in found]
    documents = [{"limit": a, "model": b, "value": c, "used": d or None} for a, b, c, d in rows]
    _show(arguments, documents, ("limit", "model", "value", "used"), rows)
    return 0


def usage(arguments: argparse.Namespace) -> int:
    """Run `trainer usage`."""
    store = _open(arguments)
    from trainer.control.prices import amount
    from trainer.control.usage import usage_by

    groups = [name.strip() for name in arguments.by.split(",") if name.strip()]
    found = usage_by(store, groups, account=arguments.account, since=arguments.since)
    rows = [
        (
            *(row[name] or "-" for name in groups),
            f"{row['requests']:,}",
            f"{row['prompt_tokens']:,}",
            f"{row['completion_tokens']:,}",
            f"{row['training_tokens']:,}",
            f"{row['device_us'] / 1e6:,.1f}",
            f"{row['replica_us'] / 1e6:,.1f}",
            amount(row["cost"]),
        )
        for row in found
    ]
    head = (*groups, "requests", "tokens in", "tokens out", "trained", "device s", "replica s", "cost")
    documents = [{**row, "cost": amount(row["cost"])} for row in found]
    _show(arguments, documents, head, rows)
    return 0


def audit(arguments: argparse.Namespace) -> int:
    """Run `trainer audit`."""
    store = _open(arguments)
    from trainer.control.audit import Head, entries, prune, verify
    from trainer.control.state import local_actor

    match arguments.action:
        case "verify":
            head = verify(store, None if arguments.contains is None else Head.parse(arguments.contains))
            sys.stdout.write(f"{head}\n")
            tell("the chain is whole; keep its end elsewhere, and give it to --contains later")
        case "prune":
            number = prune(store, local_actor(), seconds_of(arguments.keep, "--keep") / 86400)
            tell(f"{number:,} entries removed")
        case "export":
            text = "".join(entry.to_json() + "\n" for entry in entries(store))
            if arguments.out is None:
                sys.stdout.write(text)
            else:
                write_atomically(Path(arguments.out), text)
        case _:
            found = list(entries(store, limit=arguments.last))
            rows = [
                (str(each.number), _time(each.time), each.actor, each.action, each.target, json.dumps(each.details))
                for each in found
            ]
            _print_table(("number", "time (UTC)", "actor", "action", "target", "details"), rows)
    return 0


def _open(arguments: argparse.Namespace) -> Store:
    missing = [name for name in ("sqlalchemy", "alembic") if find_spec(name) is None]
    if missing:
        raise UserError(f"accounts need {' and '.join(missing)}: pip install 'tunesmith[accounts]'")
    from trainer.control.store import Store, store_url

    return Store(store_url(arguments.store)).open()


def _print_key(key: str) -> None:
    sys.stdout.write(f"{key}\n")
    tell("this key is shown only now; the server keeps its SHA-256")


def _show(arguments: argparse.Namespace, documents: Any, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if arguments.json:
        sys.stdout.write(json.dumps(documents) + "\n")
    else:
        _print_table(head, rows)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in table_lines([tuple(head), *rows])))


def _day(seconds: float | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
