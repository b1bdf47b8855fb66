"""Accounts, keys, quotas, use and the audit log in a real SQLite store."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from stores import ACTOR, with_team

from trainer.control import audit, keys
from trainer.control.accounts import AccountError, create_account, list_accounts, set_disabled
from trainer.control.audit import AuditError, Head
from trainer.control.durations import seconds_of
from trainer.control.prices import PriceError, amount, read_prices
from trainer.control.quotas import quotas_of, set_quota
from trainer.control.state import first_admin_key
from trainer.control.store import Store, StoreDownError, StoreError
from trainer.control.tables import METADATA
from trainer.control.usage import Used, add_usage, spent, usage_by
from trainer.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return with_team(tmp_path / "state")


def test_the_migrations_make_the_declared_tables_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/state/store.sqlite").open()
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    assert store.file is not None
    assert [oct(path.stat().st_mode & 0o777) for path in (store.file, store.file.parent)] == ["0o600", "0o700"]


def test_a_store_of_a_newer_program_is_refused(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="revision 9999, written by a newer tunesmith; this one knows 0002: upgrade"):
        Store(f"sqlite:///{store.file}").open()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "write sqlite:///FILE or postgresql"),
        ("mysql://a/b", "SQLite or PostgreSQL"),
        ("sqlite://", "name a file"),
        ("sqlite:////proc/nothing/store.sqlite", "No such file"),
    ],
)
def test_a_store_that_cannot_be_is_refused(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store(url).open()


def test_a_key_is_stored_as_its_digest_and_checked_whole(store: Store) -> None:
    key = keys.create_key(store, ACTOR, "team", {"inference"}, note="laptop")
    found = keys.find_key(store, key)
    assert found is not None
    assert (found.account, found.scopes, found.problem(time.time())) == ("team", frozenset({"inference"}), None)
    assert keys.KEY.fullmatch(key)
    last = "A" if key[-1] != "A" else "B"
    for other in (key[:-1] + last, key + "A", key[:-1], "tsk_", "", f"tsk_{found.id}_" + "A" * 43):
        assert keys.find_key(store, other) is None
    with store.read() as connection:
        (stored,) = connection.execute(text("SELECT digest FROM keys")).scalars()
    assert stored == hashlib.sha256(key.encode()).hexdigest()
    assert store.file is not None
    secret = key.rpartition("_")[2].encode()
    assert not any(secret in file.read_bytes() for file in store.file.parent.iterdir())


def test_a_key_ends_when_it_is_revoked_expires_is_rotated_or_its_account_is_disabled(store: Store) -> None:
    def problem(key: str, later_s: float = 0) -> str | None:
        found = keys.find_key(store, key)
        assert found is not None
        return found.problem(time.time() + later_s)

    def identity(key: str) -> str:
        return key.split("_")[1]

    expiring = keys.create_key(store, ACTOR, "team", {"training"}, expires_s=100)
    assert (problem(expiring, 90), problem(expiring, 110)) == (None, "the key has expired")
    rotated = keys.rotate_key(store, ACTOR, identity(expiring), grace_s=50)
    assert (problem(expiring, 40), problem(expiring, 60)) == (None, "the key has expired")
    assert (problem(rotated, 90), problem(rotated, 110)) == (None, "the key has expired")
    at_once = keys.rotate_key(store, ACTOR, identity(rotated))
    assert problem(rotated) == "the key is revoked"
    with pytest.raises(AccountError, match="the key is revoked"):
        keys.rotate_key(store, ACTOR, identity(rotated))
    set_disabled(store, ACTOR, "team", is_disabled=True)
    assert problem(at_once) == "the account is disabled"
    set_disabled(store, ACTOR, "team", is_disabled=False)
    keys.revoke_key(store, ACTOR, identity(at_once))
    assert problem(at_once) == "the key is revoked"


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ({"inference"}, {"inference"}),
        ({"metrics", "training"}, {"metrics", "training"}),
        ({"admin"}, {"inference", "training", "admin", "metrics"}),  # the admin may everything
    ],
)
def test_scopes_allow_themselves_and_admin_allows_all(store: Store, scopes: set[str], allowed: set[str]) -> None:
    found = keys.find_key(store, keys.create_key(store, ACTOR, "team", scopes))
    assert found is not None
    assert {scope for scope in keys.SCOPES if found.allows(scope)} == allowed


def test_what_cannot_be_made_is_refused_and_leaves_no_audit_entry(store: Store) -> None:
    before = audit.verify(store)
    for refused, message in (
        (lambda: create_account(store, ACTOR, "team"), "exists"),
        (lambda: create_account(store, ACTOR, "a b"), "letters, digits"),
        (lambda: keys.create_key(store, ACTOR, "nobody", {"inference"}), "no account 'nobody'"),
        (lambda: keys.create_key(store, ACTOR, "team", {"root"}), "scopes root: there are inference"),
        (lambda: keys.create_key(store, ACTOR, "team", {"admin"}, expires_s=-1), "must be positive"),
        (lambda: keys.revoke_key(store, ACTOR, "0" * 16), "no key"),
        (lambda: set_quota(store, ACTOR, "team", {"speed": "1"}), "no limit 'speed'"),
        (lambda: set_quota(store, ACTOR, "team", {"replicas": "1.5"}), "a whole number"),
        (lambda: set_quota(store, ACTOR, "team", {"credit": "-1"}), "the credit was 0"),
        (lambda: set_quota(store, ACTOR, "team", {"credit": "1"}, model="m"), "of the whole account"),
        # the first is undone with the second
        (lambda: set_quota(store, ACTOR, "team", {"replicas": "1", "speed": "1"}), "no limit 'speed'"),
    ):
        with pytest.raises(AccountError, match=message):
            refused()
    assert audit.verify(store) == before
    assert quotas_of(store, "team") == []


def test_the_first_admin_key_is_made_once_and_again_when_none_is_valid(store: Store) -> None:
    key = first_admin_key(store)
    assert key is not None
    assert first_admin_key(store) is None
    set_disabled(store, ACTOR, "admin", is_disabled=True)
    second = first_admin_key(store)
    assert second is not None
    found = keys.find_key(store, second)
    assert found is not None
    assert found.account == "admin-again"
    assert [(each.name, each.is_disabled, each.num_keys) for each in list_accounts(store)] == [
        ("admin", True, 1),
        ("admin-again", False, 1),
        ("team", False, 0),
    ]


def test_quotas_are_set_changed_and_removed(store: Store) -> None:
    set_quota(store, ACTOR, "team", {"credit": "1.5", "device_hours": "0.5", "replicas": "3"})
    set_quota(store, ACTOR, "team", {"credit": "+0.000000001", "replicas": None})
    set_quota(store, ACTOR, "team", {"tokens_per_minute": "10_000"}, model="m")
    assert [(each.model, each.limit, each.value, each.shown) for each in quotas_of(store, "team")] == [
        ("*", "credit", 1_500_000_001, "1.500000001"),
        ("*", "device_hours", 1800, "0.5"),
        ("m", "tokens_per_minute", 10_000, "10000"),
    ]
    changes = [each.details for each in audit.entries(store) if each.action == "quota.set"]
    assert changes[3] == {"limit": "credit", "model": "*", "before": "1.5", "after": "1.500000001"}


@pytest.mark.parametrize(("words", "seconds"), [("0.3333", 1200), ("0.0001", 1), ("0", 0), ("2", 7200)])
def test_device_hours_are_counted_in_whole_seconds_rounded_up(store: Store, words: str, seconds: int) -> None:
    set_quota(store, ACTOR, "team", {"device_hours": words})
    assert [each.value for each in quotas_of(store, "team")] == [seconds]


@pytest.mark.parametrize("words", ["NaN", "Infinity", "-0.5", "many"])
def test_device_hours_that_are_no_number_are_refused(store: Store, words: str) -> None:
    with pytest.raises(AccountError, match="must be a number"):
        set_quota(store, ACTOR, "team", {"device_hours": words})


def test_use_is_added_up_and_grouped(store: Store) -> None:
    one = Used("2026-11-25", "team", "m", "a", 1, 10, 5, 7, 0, 100)
    other = Used("2026-11-26", "team", "m", "", 1, 20, 5, 7, 0, 200)
    add_usage(store, [one, one])
    add_usage(store, [one, other, Used("2026-11-26", "rest", "m", "", requests=1, cost=1)])
    sums = {"requests": 4, "prompt_tokens": 50, "completion_tokens": 20, "device_us": 28, "replica_us": 0, "cost": 500}
    sums["training_tokens"] = 0
    assert usage_by(store, ["account"], account="team") == [{"account": "team"} | sums]
    assert [(row["day"], row["addon"], row["cost"]) for row in usage_by(store, ["day", "addon"])] == [
        ("2026-11-25", "a", 300),
        ("2026-11-26", "", 201),
    ]
    assert [row["cost"] for row in usage_by(store, [], since="2026-11-26")] == [201]
    assert (spent(store, "team"), spent(store, "nobody")) == (500, 0)
    with pytest.raises(AccountError, match="usage by colour: there are day"):
        usage_by(store, ["colour"])
    with pytest.raises(AccountError, match="write a day"):
        usage_by(store, [], since="yesterday")


def test_one_flipped_byte_of_any_entry_is_found(tmp_path: Path, store: Store) -> None:
    for number in range(3):
        create_account(store, ACTOR, f"team-{number}")
    file = store.file
    assert file is not None
    with store.read() as connection:
        connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
        rows = connection.execute(text("SELECT number, entry, hash FROM audit ORDER BY number")).all()
    whole = file.read_bytes()
    head = audit.verify(store)
    assert head == Head(4, rows[-1].hash)
    target = rows[1]
    begin = whole.index(target.entry.encode())
    for place in range(begin, begin + len(target.entry) + len(target.hash)):  # the hash stands behind the entry
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(AuditError, match=r"audit entry [23] "):
            audit.verify(store)
    file.write_bytes(whole)
    assert audit.verify(store) == head


def test_an_entry_that_is_removed_inserted_or_rewritten_with_its_hash_is_found(store: Store) -> None:
    for number in range(3):
        create_account(store, ACTOR, f"team-{number}")
    noted = audit.verify(store)
    for statement in ("UPDATE audit SET entry = ''", "DELETE FROM audit"):
        with pytest.raises(DBAPIError, match="append-only"), store.write() as connection:
            connection.execute(text(statement))
    with store.write() as connection:  # as somebody who can change the schema
        connection.execute(text("DROP TRIGGER audit_no_delete"))
        connection.execute(text("DROP TRIGGER audit_no_update"))
        connection.execute(text("DELETE FROM audit WHERE number = 4"))
    assert audit.verify(store).number == 3  # a chain that was cut at its end is whole in itself
    with pytest.raises(AuditError, match="does not contain 4:"):
        audit.verify(store, noted)
    with store.write() as connection:
        entry = json.loads(connection.execute(text("SELECT entry FROM audit WHERE number = 2")).scalar_one())
        words = json.dumps(entry | {"target": "innocent"}, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(words.encode()).hexdigest()
        connection.execute(text("UPDATE audit SET entry = :a, hash = :b WHERE number = 2"), {"a": words, "b": digest})
    with pytest.raises(AuditError, match="audit entry 3 does not continue the chain from entry 2"):
        audit.verify(store)
    with store.write() as connection:
        connection.execute(text("DELETE FROM audit WHERE number = 2"))
    with pytest.raises(AuditError, match="audit entry 3 follows entry 1: entries between them are missing"):
        audit.verify(store)


def test_retention_removes_old_entries_and_the_rest_is_still_a_chain(store: Store) -> None:
    create_account(store, ACTOR, "second")
    noted = audit.verify(store)
    assert audit.prune(store, ACTOR, keep_days=1) == 0
    assert audit.prune(store, ACTOR, keep_days=0) == 2
    (left,) = audit.entries(store)
    assert (left.number, left.action, left.target) == (3, "audit.prune", "entries to 2")
    assert audit.verify(store, noted).number == 3  # what was noted is the anchor
    create_account(store, ACTOR, "third")
    assert audit.verify(store).number == 4
    with pytest.raises(DBAPIError, match="append-only"), store.write() as connection:
        connection.execute(text("DELETE FROM audit WHERE number = 4"))
    with pytest.raises(UserError, match="write NUMBER:HASH"):
        Head.parse("4")


def test_concurrent_actions_make_one_chain(store: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: create_account(store, ACTOR, f"team-{number}"), range(40)))
    assert audit.verify(store).number == 41


def test_a_store_that_is_away_is_one_error_and_no_new_file(store: Store) -> None:
    assert store.file is not None
    away = store.file.with_name("away")
    store.file.rename(away)
    with pytest.raises(StoreDownError, match="does not answer: unable to open"):
        list_accounts(store)
    assert not store.file.exists()
    away.rename(store.file)
    assert [each.name for each in list_accounts(store)] == ["team"]


def test_prices_are_exact_and_mistakes_name_their_place(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(
        'unit: euros\nmodels: {small: {input: 0.1, output: 0.4}, "*": {output: 2}}\ndevice_hour: {CPU: 0.36}\n'
    )
    prices = read_prices(str(file))
    assert prices.of_model("small").cost(1_000_000, 500_000) == 300_000_000  # 0.1 + 0.2 euros
    assert prices.of_model("other").cost(7, 1) == 2_000
    assert prices.device_cost("CPU", 10) == 1_000_000  # 0.001 euros
    assert (prices.device_cost("H100-80G", 10), read_prices(None).of_model("small").cost(9, 9)) == (0, 0)
    assert amount(prices.of_model("small").cost(3, 0)) == "0.0000003"
    for content, message in (
        ("models: {small: {input: -1}}", "models.small.input: Input should be greater than or equal to 0"),
        ("models: {small: {inputs: 1}}", "models.small.inputs: Extra inputs"),
        ("unit: [", "prices.yaml:2: "),
        ("- 1", "prices: Extra inputs"),
    ):
        file.write_text(content + "\n")
        with pytest.raises(PriceError, match=message):
            read_prices(str(file))


def test_durations() -> None:
    assert [seconds_of(words, "--expires") for words in ("90s", "2m", "1h", "30d")] == [90, 120, 3600, 2_592_000]
    with pytest.raises(UserError, match="--expires soon: write a duration"):
        seconds_of("soon", "--expires")
