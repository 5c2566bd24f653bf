"""A handler for outbox-connector: `chat_title_changed` sets the title of a chat.

It needs a table:

    create table chat_titles (
        chat_id   varchar(36) primary key,
        title     varchar(200) not null,
        outbox_id bigint not null unique
    );
    grant select, insert, update on chat_titles to outbox_sink;
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from connector.errors import PayloadError


class ChatTitleHandler:
    """Stores `chat_id` and `title`; of several titles the last one in the outbox stays."""

    columns: Mapping[str, str] = {"chat_id": "text", "title": "text"}

    # A batch may hold several titles of one chat, and an insert may not touch a row twice: only the last one is stored.
    # A message that comes again after a later one changes nothing.
    statement = """
    insert into chat_titles as t (chat_id, title, outbox_id)
    select distinct on (a.chat_id) a.chat_id, a.title, a.outbox_id
      from accepted as a
     order by a.chat_id, a.place desc
        on conflict (chat_id) do update
       set title = excluded.title, outbox_id = excluded.outbox_id
     where t.outbox_id < excluded.outbox_id
    """

    def parse(self, payload: Any) -> Sequence[object]:  # noqa: ANN401 - a payload is any JSON value
        """Return chat_id and title.

        Raises:
            PayloadError: one of them is not text.
        """
        match payload:
            case {"chat_id": str(chat_id), "title": str(title)}:
                return chat_id, title
        raise PayloadError("payload: expected an object with the texts `chat_id` and `title`")
