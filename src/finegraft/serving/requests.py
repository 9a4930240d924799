"""Bodies of requests: the OpenAI fields that are understood, and nothing else.

What: one pydantic model for each endpoint, from which the OpenAPI document is made as well. How:
strict types and bounds; fields that cannot change an answer here are taken and unused, fields that
would change it and are not supported are refused by value. Constraint: no unknown field passes in
silence, and nothing that JSON can hold gets further than this file without being an ordinary value
(no NaN, no lone surrogate, no nesting beyond reason). Trade-off: a client that sends a field of its
own must leave it out.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from finegraft.serving.engines import Ask, Options

_DEEPEST = 64  # levels of a JSON schema; real ones have a dozen

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Stop = str | list[str]
Name = Annotated[str, Field(max_length=512)]


def _ordinary(value: Any) -> Any:
    """Refuse JSON that templates and grammars could stumble over."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            break
    else:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (UnicodeEncodeError, ValueError) as error:
        raise ValueError(f"not ordinary JSON: {type(error).__name__}") from error
    return value


Object = Annotated[dict[str, Any], AfterValidator(_ordinary)]


def _stops(value: Stop | None) -> Stop | None:
    found = [value] if isinstance(value, str) else value or []
    if len(found) > 16 or not all(0 < len(text) <= 1000 for text in found):
        raise ValueError("at most 16 stop sequences of 1 to 1000 characters")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Body):
    """A part of a message; texts are the only kind."""

    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    """What a tool call calls."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A call that the assistant made earlier."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message as templates know it."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        out: dict[str, Any] = {"role": role, "content": content or ""}
        if self.name is not None:
            out["name"] = self.name
        if self.tool_calls:
            out["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        return out


class Tool(_Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Object


class StreamOptions(_Body):
    """What a stream reports beside text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Body):
    model: Name | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: Annotated[Stop, AfterValidator(_stops)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = None

    @property
    def usage_wanted(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _options(self, longest: int | None, top_logprobs: int | None) -> Options:
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("logit_bias takes token ids as keys")
            bias[int(key)] = value
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Options(
            max_tokens=longest,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=stop,
            top_logprobs=top_logprobs,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=bias,
        )


class Chat(_Common):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: Object | None = None
    modalities: list[Literal["text"]] | None = None
    # taken, and without a meaning here
    metadata: Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def ask(self, model: str) -> Ask:
        """The request as engines take it.

        Raises:
            ValueError: What types alone do not say.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        shares = (self.top_logprobs or 0) if self.logprobs else None
        tools = () if self.tool_choice == "none" else tuple(self.tools or ())
        kind = (self.response_format or {}).get("type", "text")
        if kind not in ("text", "json_object", "json_schema"):
            raise ValueError("response_format.type is one of text, json_object, json_schema")
        if kind == "json_schema":
            inner = self.response_format.get("json_schema") if self.response_format else None
            if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
                raise ValueError("response_format.json_schema.schema is missing or not an object")
        longest = self.max_completion_tokens or self.max_tokens
        return Ask(
            model=model,
            options=self._options(longest, shares),
            messages=tuple(message.plain() for message in self.messages),
            tools=tuple(tool.model_dump() for tool in tools),
            tool_choice=self.tool_choice,
            response_format=None if kind == "text" else self.response_format,
        )


class Completion(_Common):
    """Body of ``/v1/completions``; 16 tokens unless it says otherwise, as in the API it copies."""

    prompt: str | Annotated[list[str], Field(max_length=1)] | list[int]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def ask(self, model: str) -> Ask:
        """The request as engines take it.

        Raises:
            ValueError: An empty prompt.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list):
            whole = all(isinstance(token, int) for token in prompt)
            prompt = tuple(prompt) if whole else prompt[0]
        if not prompt:
            raise ValueError("prompt is empty")
        options = self._options(self.max_tokens or 16, self.logprobs)
        return Ask(model=model, options=options, prompt=prompt)


class Embeddings(_Body):
    """Body of ``/v1/embeddings``."""

    model: Name | None = None
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)] | list[int]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: str | None = None

    def texts(self) -> list[str | list[int]]:
        """One entry for each vector."""
        if isinstance(self.input, str):
            return [self.input]
        if all(isinstance(token, int) for token in self.input):
            return [list(self.input)]  # type: ignore[arg-type]
        return list(self.input)  # type: ignore[arg-type]
