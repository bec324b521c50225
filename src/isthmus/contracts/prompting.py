"""Values of the prompting plane: chat messages in, text out."""

import msgspec

from isthmus.contracts.errors import InvalidInput, TooLarge

MAX_MESSAGES = 4096
MAX_TEXT_BYTES = 8 * 1024 * 1024
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation. Raises `InvalidInput` for an unknown role."""

    role: str
    content: str
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidInput(f"role is not one of {', '.join(ROLES)}", "messages.role")
        if len(self.content) > MAX_TEXT_BYTES:
            raise TooLarge(f"a message has at most {MAX_TEXT_BYTES} characters", "messages.content")


class Piece(msgspec.Struct, frozen=True):
    """What some tokens added to the text: `text` is ready to be sent, `stopped` says that a stop string was met."""

    text: str
    stopped: bool = False
