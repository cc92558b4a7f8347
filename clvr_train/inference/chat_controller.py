"""The controller behind any server that speaks OpenAI's chat protocol: vLLM, transformers serve, a hosted API."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL.Image import Image, Resampling

from clvr_train.data.images import open_image
from clvr_train.inference.closed_loop import NoReply
from clvr_train.services.chat import ChatClient, image_url

SAMPLED = {"temperature": 1.0, "top_p": 0.9}  # as `models.qwen_vl.Controller` draws its retries


class ChatController:
    """Answers chats through a client; it keeps nothing between calls, and any number of threads may ask it.

    Args:
        client: its `limit` bounds the conversations that are asked at once.
        max_pixels: an image with more is made smaller before it is sent.
    """

    def __init__(self, client: ChatClient, max_pixels: int | None = None) -> None:
        self.client, self.max_pixels = client, max_pixels

    def reply(self, conversations: Sequence[list[dict]], seed: int | None = None) -> list[str | NoReply]:
        """One reply a conversation (`method.protocol.chat_messages`): at temperature 0, or drawn with `seed` if it is
        given.

        A reply that was refused or cut at the longest length is a `NoReply` that another attempt may mend; no reply at
        all, after the client's own attempts, is one for good.
        """
        sampling = None if seed is None else {**SAMPLED, "seed": seed % 2**31}  # what every server takes

        def ask(messages: list[dict]) -> str | NoReply:
            answer = self.client.ask(self.messages(messages), str, sampling)
            return NoReply(answer.reason, again=answer.unusable) if answer.value is None else answer.value

        with ThreadPoolExecutor(min(self.client.options.limit, len(conversations)) or 1) as pool:
            return list(pool.map(ask, conversations))

    def messages(self, messages: list[dict]) -> list[dict]:
        """A conversation as OpenAI's protocol has it, in the order given. A turn of text alone is a string, which the
        template of every server takes.
        """
        return [{"role": message["role"], "content": self._content(message["content"])} for message in messages]

    def _content(self, parts: list[dict]) -> str | list[dict]:
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return [
            {"type": "image_url", "image_url": {"url": self._url(open_image(part["image"]))}}
            if part["type"] == "image"
            else part
            for part in parts
        ]

    def _url(self, image: Image) -> str:
        """As PNG: the controller sees the pixels that one in process would see."""
        width, height = image.size
        if self.max_pixels is not None and width * height > self.max_pixels:
            scale = (self.max_pixels / (width * height)) ** 0.5
            size = max(1, int(width * scale)), max(1, int(height * scale))
            image = image.convert("RGB").resize(size, Resampling.BICUBIC)
        return image_url(image, "PNG", compress_level=1)
