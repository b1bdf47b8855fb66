"""Tokens that accounts trained on, beside those of requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; what was used before is 0."""
    op.add_column("usage", sa.Column("training_tokens", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    """Leave the column out; its sums are lost."""
    op.drop_column("usage", "training_tokens")
