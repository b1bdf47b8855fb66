"""Runs the migrations on the connection that `Store.migrate` opened."""

from __future__ import annotations

from alembic import context

from trainer.control.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
