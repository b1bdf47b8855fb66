"""The tables of the store, as the newest migration leaves them; for the modules of this room."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text

METADATA = MetaData()

ACCOUNTS = Table(
    "accounts",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("created", Float, nullable=False),  # seconds since 1970, as all times here
    Column("is_disabled", Boolean, nullable=False),
)
KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("account", String(64), ForeignKey("accounts.name"), nullable=False, index=True),
    Column("digest", String(64), nullable=False),  # SHA-256 of the whole key, in hexadecimal
    Column("scopes", String(128), nullable=False),  # names with commas between
    Column("note", String(200), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),  # None never
    Column("revoked", Float),
)
QUOTAS = Table(
    "quotas",
    METADATA,
    Column("account", String(64), ForeignKey("accounts.name"), primary_key=True),
    Column("model", String(200), primary_key=True),  # "*" is all models together
    Column("limit", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),  # credit in 1e-9 units, device-hours in seconds, others as counts
)
USAGE = Table(
    "usage",
    METADATA,
    Column("day", String(10), primary_key=True),  # UTC, 2026-11-26
    Column("account", String(64), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("addon", String(200), primary_key=True),  # "" is the base model
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("device_us", BigInteger, nullable=False),  # the share of requests in the engine's time, in microseconds
    Column("replica_us", BigInteger, nullable=False),  # replicas of a deployment, times their devices
    Column("cost", BigInteger, nullable=False),  # in 1e-9 units
    Column("training_tokens", BigInteger, nullable=False, server_default="0"),  # of passes of the training API
)
AUDIT = Table(
    "audit",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("entry", Text, nullable=False),  # JSON, hashed as it stands
    Column("hash", String(64), nullable=False),
)
AUDIT_ANCHOR = Table(  # one row: the last entry that retention removed
    "audit_anchor",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
)
DEPLOYMENTS = Table(
    "deployments",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("account", String(64), nullable=False),
    Column("spec", Text, nullable=False),  # JSON: what was asked for
    Column("state", String(16), nullable=False),
    Column("problem", Text, nullable=False),
    Column("generation", Integer, nullable=False),  # grows with each change of the specification
    Column("observed", Integer, nullable=False),  # generation that the control process carried out
    Column("status", Text, nullable=False),  # JSON: replicas and cold start, written by the control process
    Column("created", Float, nullable=False),
    Column("changed", Float, nullable=False),
)
CONTROLLER = Table(  # one row: which process carries deployments out
    "controller",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("seen", Float, nullable=False),
)
