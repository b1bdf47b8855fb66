"""What the policy was asked, as the journal and the held-out answers keep it."""

from __future__ import annotations

from trainer.config.recipe import DataSettings
from trainer.data.forms import read_conversation, without_ignored
from trainer.run.journal import JournalPrompt
from trainer.types import Conversation, Row


def journal_prompt(row: Row, data: DataSettings, conversation: Conversation | None = None) -> JournalPrompt:
    """The messages of a row, and its other fields.

    Args:
        row: an rft prompt.
        data: how rows are read.
        conversation: of one of its rollouts, where an environment or tools wrote the prompt.

    Raises:
        DataError: the row is no prompt.
    """
    if conversation is not None:
        messages = conversation.messages[: conversation.num_prompt]
        fields = {name: value for name, value in without_ignored(row, data).items() if name != "messages"}
        return JournalPrompt(row.index, str(row), messages, fields)
    chat = read_conversation(row, data, with_completion=False)
    fields = {name: value for name, value in without_ignored(row, data).items() if name not in chat.uses}
    return JournalPrompt(row.index, str(row), tuple(chat.messages), fields)
