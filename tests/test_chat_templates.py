"""Histories come into the shape that a chat template can take, and what the template adds to
them decides how the answer starts."""

import base64
import io
import json
import time
from types import SimpleNamespace

import pytest
from helpers import ALONE, call
from jinja2 import Environment, TemplateError
from mlx_lm.chat_templates import deepseek_v32
from mlx_lm.server import CompletionRequest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from PIL import Image
from test_api import CHAT
from tiny_models import LLAMA

from mlx_lm_ext.bench.random_model import SPECIAL, TEMPLATE, write_model
from mlx_lm_ext.engine.upstream import SingleGenerator
from mlx_lm_ext.errors import RequestError
from mlx_lm_ext.request.fields import make_generation_arguments, parse_body
from mlx_lm_ext.request.history import parse_messages
from mlx_lm_ext.request.preparation import Preparations
from mlx_lm_ext.request.request import Request
from mlx_lm_ext.request.served_model import ServedModel
from mlx_lm_ext.request.template_shape import TemplateShape
from mlx_lm_ext.request.tokenizing import BoundedTokenizer

DEFAULTS = dict(max_tokens=10, temp=0, top_p=1, top_k=0, min_p=0, num_draft_tokens=1)

# Parts of templates

MESSAGE = "<{{ m.role }}>{{ m.content }}"
START = "{% if add_generation_prompt %}<assistant>{% endif %}"


def loop(message=MESSAGE, end=START):
    return f"{{% for m in messages %}}{message}{{% endfor %}}{end}"


def with_calls(call, message=MESSAGE):
    return loop(
        f"{{% if m.tool_calls %}}<assistant>{{{{ m.content }}}}"
        f"{{% for t in m.tool_calls %}}{call}{{% endfor %}}{{% else %}}{message}{{% endif %}}"
    )


def refusing(condition, message=MESSAGE):
    return loop(
        f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{message}"
    )


JSON_CALLS = with_calls("[{{ t.function.name }}|{{ t.function.arguments | tojson }}]")
TEXT_CALLS = with_calls(
    "{{ '[' + t.function.name + '|' + t.function.arguments + ']' }}"
)
ONE_CALL = with_calls(
    "{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]"
)
STRICT = refusing("m.role == 'system' and not loop.first")
IN_TURN = refusing(
    "m.role not in ('user', 'assistant') or "
    "(m.role == 'user') != (loop.index0 % 2 == 0)"
)


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text="", *calls, **fields):
    calls = [
        {"id": f"call_{name}", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls, **fields}


def tool(text, id=None, **fields):
    return {
        "role": "tool",
        "content": text,
        "tool_call_id": id and f"call_{id}",
    } | fields


LS = ("ls", '{"a":"b"}')


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model with tokens for thinking and for the beginning of a text."""
    special = [*SPECIAL, "<think>", "</think>", "<bos>"]
    folder = tmp_path_factory.mktemp("models") / "thinking"
    write_model(folder, "llama", dict(LLAMA), special=special)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<bos>"}))
    return folder


@pytest.fixture
def render(folder):
    """Renders messages with a template, through everything that a request goes through;
    gives the text of the prompt, the segments and the first state."""

    def render(template, *messages, cli=None, role_mapping=None, tools=None, **body):
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = template
        if callable(template):
            tokenizer = TokenizerWrapper(tokenizer._tokenizer, chat_template=template)
        elif template is None:
            tokenizer.has_chat_template = False
        body = parse_body(json.dumps({"messages": messages, **body}).encode())
        args = make_generation_arguments(body, SimpleNamespace(**DEFAULTS))
        request = CompletionRequest(
            "chat", "", parse_messages(body), tools, role_mapping
        )
        provider = SimpleNamespace(
            cli_args=SimpleNamespace(chat_template_args=cli or {}), processor=None
        )
        bounded = BoundedTokenizer(
            tokenizer, None, 10_000, "messages", Preparations().begin()
        )
        prompt, segments, types, state = SingleGenerator(provider).tokenize(
            bounded, request, args
        )
        assert sum(segments, []) == prompt and len(types) == len(segments)
        decoded = [tokenizer.decode(segment) for segment in segments]
        return SimpleNamespace(
            prompt=tokenizer.decode(prompt), segments=decoded, types=types, state=state
        )

    return render


# Shapes


HISTORY = [system("s"), user("u"), assistant("a"), user("v")]
ASKED = [user("u"), assistant("", LS), tool("r", "ls")]


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        # What a template writes stays as it is.
        (loop(), HISTORY, "<system>s<user>u<assistant>a<user>v<assistant>"),
        (JSON_CALLS, ASKED, '<user>u<assistant>[ls|{"a": "b"}]<tool>r<assistant>'),
        # A text where the template takes one, as it was sent.
        (TEXT_CALLS, ASKED, '<user>u<assistant>[ls|{"a":"b"}]<tool>r<assistant>'),
        (
            TEXT_CALLS,
            [user("u"), assistant("", ("ls", '{"a": "l')), tool("r", "ls")],
            '<user>u<assistant>[ls|{"a": "l]<tool>r<assistant>',
        ),
        # A template that writes Python's way to say it.
        (
            with_calls("[{{ t.function.name }}|{{ t.function.arguments }}]"),
            ASKED,
            '<user>u<assistant>[ls|{"a":"b"}]<tool>r<assistant>',
        ),
        # Calls of a template that looks for a content that is none.
        (
            loop(
                "{% if m.content is none %}{% for t in m.tool_calls %}"
                "[{{ t.function.name + t.function.arguments }}]{% endfor %}{% else %}"
                + MESSAGE
                + "{% endif %}"
            ),
            [user("u"), assistant("text", LS), tool("r", "ls")],
            '<user>u<assistant>text[ls{"a":"b"}]<tool>r<assistant>',
        ),
        (
            loop(
                "{% if m.content is none %}{% for t in m.tool_calls %}"
                "[{{ t.function.name + t.function.arguments }}]{% endfor %}{% else %}"
                + MESSAGE
                + "{% endif %}"
            ),
            [user("u"), assistant("", LS), tool("r", "ls")],
            '<user>u[ls{"a":"b"}]<tool>r<assistant>',
        ),
        # Calls and results of a template that knows neither.
        (
            IN_TURN,
            [*ASKED, user("go on")],
            '<user>u<assistant>{"name": "ls", "arguments": {"a": "b"}}'
            "<user>Result of the tool ls:\n\nr\n\ngo on<assistant>",
        ),
        (
            loop(),
            ASKED,
            '<user>u<assistant>{"name": "ls", "arguments": {"a": "b"}}<tool>r<assistant>',
        ),
        # One call in a message.
        (
            ONE_CALL,
            [
                user("u"),
                assistant("text", LS, ("cat", "{}")),
                tool("2", "cat"),
                tool("1", "ls"),
            ],
            '<user>u<assistant>text[ls|{"a": "b"}]<tool>1<assistant>[cat|{}]<tool>2'
            "<assistant>",
        ),
        # Results without a call.
        (
            JSON_CALLS.replace(
                "{% if m.tool_calls %}",
                "{% if m.role == 'tool' and not loop.previtem.tool_calls %}"
                "{{ raise_exception('no call') }}{% endif %}{% if m.tool_calls %}",
            ),
            [user("u"), tool("r", name="f"), user("v")],
            "<user>u<user>Result of the tool f:\n\nr<user>v<assistant>",
        ),
        # A result whose name the template wants.
        (
            with_calls(
                "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]",
                "{% if m.role == 'tool' %}{{ m.name + ':' }}{% endif %}" + MESSAGE,
            ),
            ASKED,
            '<user>u<assistant>[ls|{"a": "b"}]ls:<tool>r<assistant>',
        ),
        # A reasoning and a text beside calls.
        (
            with_calls(
                "{% if m.thinking and m.content %}{{ raise_exception('both') }}{% endif %}"
                "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]"
            ),
            [user("u"), assistant("text", LS, reasoning="why"), tool("r", "ls")],
            '<user>u<assistant>why\n\ntext[ls|{"a": "b"}]<tool>r<assistant>',
        ),
        # A text beside calls that the template leaves out, and calls that take its place.
        (
            loop(
                "{% if m.tool_calls %}{% for t in m.tool_calls %}"
                "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]{% endfor %}"
                "{% else %}" + MESSAGE + "{% endif %}"
            ),
            [user("u"), assistant("text", LS), tool("r", "ls"), assistant("", LS)],
            '<user>u<assistant>text[ls|{"a": "b"}]<tool>r[ls|{"a": "b"}]<assistant>',
        ),
        # Only the text beside the first calls is written, as in DeepSeek's templates.
        (
            "{% set n = namespace(i=0) %}"
            + loop(
                "{% if m.tool_calls %}{% if n.i == 0 %}<assistant>{{ m.content }}"
                "{% set n.i = 1 %}{% endif %}{% for t in m.tool_calls %}"
                "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]{% endfor %}"
                "{% else %}" + MESSAGE + "{% endif %}"
            ),
            [*ASKED[:1], assistant("a", LS), tool("r", "ls"), assistant("b", LS)],
            '<user>u<assistant>a[ls|{"a": "b"}]<tool>r<assistant>b[ls|{"a": "b"}]<assistant>',
        ),
        # Calls at the start, where the template takes a text for the user's.
        (
            "<user>{{ messages[0].content }}"
            + loop(
                "{% if not loop.first %}{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }}"
                "|{{ m.tool_calls[0].function.arguments | tojson }}]{% else %}"
                + MESSAGE
                + "{% endif %}{% endif %}"
            ),
            [assistant("", LS), tool("r", "ls"), user("u")],
            '<user>[ls|{"a": "b"}]<tool>r<user>u<assistant>',
        ),
        # The system's place.
        # With the last message only if that is the user's, as in one of Mistral's templates.
        (
            with_calls(
                "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]",
                "{% if m.role == 'user' and loop.last and messages[0].role == 'system' %}"
                "({{ messages[0].content }}){% endif %}"
                "{% if m.role != 'system' %}" + MESSAGE + "{% endif %}",
            ),
            [system("s"), *ASKED],
            '<user>s\n\nu<assistant>[ls|{"a": "b"}]<tool>r<assistant>',
        ),
        (
            STRICT,
            [system("s"), {"role": "developer", "content": "d"}, user("u")],
            "<system>s\n\nd<user>u<assistant>",
        ),
        (
            STRICT,
            [*HISTORY[:3], system("t"), user("v")],
            "<system>s\n\nt<user>u<assistant>a<user>v<assistant>",
        ),
        (
            STRICT,
            [*HISTORY[1:3], system("t"), user("v")],
            "<system>t<user>u<assistant>a<user>v<assistant>",
        ),
        # One that is left out without a word.
        (
            loop("{% if m.role != 'system' or loop.first %}" + MESSAGE + "{% endif %}"),
            [*HISTORY[:3], system("t"), user("v")],
            "<system>s\n\nt<user>u<assistant>a<user>v<assistant>",
        ),
        (IN_TURN, HISTORY, "<user>s\n\nu<assistant>a<user>v<assistant>"),
        (IN_TURN, [system("s")], "<user>s<assistant>"),
        # Turns.
        (IN_TURN, [user("u"), user("v")], "<user>u\n\nv<assistant>"),
        (
            IN_TURN,
            [user("u"), assistant("a"), assistant("b"), user("v")],
            "<user>u<assistant>a\n\nb<user>v<assistant>",
        ),
        (
            IN_TURN,
            [assistant("a"), user("u")],
            "<user><assistant>a<user>u<assistant>",
        ),
        (
            refusing("messages | selectattr('role', 'equalto', 'user') | list == []"),
            [system("s")],
            "<system>s<user><assistant>",
        ),
        # Turns that do not count calls and results, as in Mistral's templates.
        (
            "{% set n = namespace(i=0) %}"
            + with_calls(
                "[{{ t.function.name }}|{{ t.function.arguments | tojson }}]",
                "{% if m.role in ('user', 'assistant') %}"
                "{% if (m.role == 'user') != (n.i % 2 == 0) %}"
                "{{ raise_exception('turns') }}{% endif %}{% set n.i = n.i + 1 %}{% endif %}"
                + MESSAGE,
            ),
            [*ASKED, user("stop"), assistant("ok", LS), user("v")],
            '<user>u<assistant>[ls|{"a": "b"}]<tool>r<assistant><user>stop'
            '<assistant>ok[ls|{"a": "b"}]<assistant><user>v<assistant>',
        ),
        # Contents that have to be parts.
        (
            loop("<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}"),
            HISTORY,
            "<system>s<user>u<assistant>a<user>v<assistant>",
        ),
        # Roles.
        (loop(), [{"role": "critic", "content": "c"}], "<critic>c<assistant>"),
        (
            refusing("m.role not in ('user', 'assistant', 'observation')"),
            [
                {"role": "observation", "content": "o"},
                {"role": "human", "content": "u"},
            ],
            "<observation>o<user>u<assistant>",
        ),
        (
            loop() + "{# developer #}",
            [{"role": "developer", "content": "d"}, user("u")],
            "<developer>d<user>u<assistant>",
        ),
        # The template does not do what it names.
        (
            refusing("m.role == 'developer'"),
            [{"role": "developer", "content": "d"}, user("u")],
            "<system>d<user>u<assistant>",
        ),
        # What gpt-oss writes, and its template refuses.
        (
            refusing("'<|channel|>final' in m.content", MESSAGE + "{{ m.reasoning }}"),
            [
                user("<|channel|>x<|message|>y"),
                assistant(
                    "<|channel|>analysis<|message|>why<|end|><|start|>assistant"
                    "<|channel|>final<|message|>a<b"
                ),
                user("v"),
            ],
            "<user><|channel|>x<|message|>y<assistant>a<bwhy<user>v<assistant>",
        ),
        (
            loop(),
            [user("u"), assistant("<|channel|>final<|message|>a"), user("v")],
            "<user>u<assistant><|channel|>final<|message|>a<user>v<assistant>",
        ),
        # What answers have in ``reasoning``.
        (
            loop(
                MESSAGE
                + "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
            ),
            [
                user("u"),
                {"role": "assistant", "content": "a", "reasoning": "why"},
                user("v"),
            ],
            "<user>u<assistant>a(why)<user>v<assistant>",
        ),
    ],
)
def test_history_is_written_by_the_template(template, messages, expected, render):
    assert render(template, *messages).prompt == expected


def test_ids_are_as_long_as_the_template_wants(render):
    template = with_calls(
        "{% if t.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "[{{ t.function.name }}|{{ t.function.arguments | tojson }}|{{ t.id }}]",
        MESSAGE + "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}",
    )
    texts = {render(template, *ASKED).prompt for _ in range(2)}
    (text,) = texts
    id = text[text.index("(") + 1 : text.index(")")]
    assert len(id) == 9 and id.isalnum() and id.isascii()
    assert text == f'<user>u<assistant>[ls|{{"a": "b"}}|{id}]<tool>r({id})<assistant>'
    kept = json.loads(json.dumps(ASKED).replace("call_ls", "abcDEF123"))
    assert "|abcDEF123]<tool>r(abcDEF123)" in render(template, *kept).prompt


def test_role_that_means_nothing_to_the_template_is_refused(render):
    with pytest.raises(RequestError) as error:
        render(IN_TURN, user("u"), {"role": "wizard", "content": "w"})
    assert (error.value.status, error.value.param) == (400, "messages[1].role")


def test_template_that_only_writes_what_it_likes_gets_what_it_can(render):
    """None of the probes shows that this history is refused."""
    text = render(
        "{% for m in messages %}{% if m.role == 'tool' and m.content == 'r' %}"
        "{{ raise_exception('no') }}{% endif %}{% endfor %}" + JSON_CALLS,
        *ASKED,
        user("go on"),
    ).prompt
    assert text == (
        '<user>u<assistant>{"name": "ls", "arguments": {"a": "b"}}'
        "<user>Result of the tool ls:\n\nr\n\ngo on<assistant>"
    )


def test_tool_has_what_the_template_reads_of_it(render):
    template = "{{ '(' + tools[0].function.description + ')' }}" + loop()
    tool = {"type": "function", "function": {"name": "f", "description": None}}
    assert render(template, user("u"), tools=[tool]).prompt == "()<user>u<assistant>"
    template = "{{ tools[0] | tojson }}"
    assert render(template, user("u"), tools=[tool]).prompt == json.dumps(tool)


def test_role_that_only_an_odd_history_lacks_is_another_one_then(render):
    turns = "(m.role == 'user') != (loop.index0 % 2 == 0)"
    said = [user("u"), assistant("a"), {"role": "function", "content": "r"}]
    text = render(refusing(turns), *said).prompt
    assert text == "<user>u<assistant>a<user>Result of a tool:\n\nr<assistant>"


def test_error_of_the_template_is_that_for_the_history_as_it_is(render):
    template = refusing("m.content == 'bad'")
    with pytest.raises(Exception, match="no"):
        render(template, user("bad"))


def test_template_that_fails_for_every_probe_gets_histories_as_they_are(render):
    template = "{% if not magic %}{{ raise_exception('no') }}{% endif %}" + JSON_CALLS
    text = render(template, *ASKED, chat_template_kwargs={"magic": True}).prompt
    assert text == '<user>u<assistant>[ls|{"a": "b"}]<tool>r<assistant>'


def test_each_probe_is_rendered_once(folder):
    tokenizer = load_tokenizer(folder)
    rendered = []

    def template(messages, **kwargs):
        rendered.append(messages)
        return "".join(str(m) for m in messages)

    tokenizer = TokenizerWrapper(tokenizer._tokenizer, chat_template=template)
    facts = {}
    messages = parse_messages({"messages": [*HISTORY, *ASKED]})
    counts = []
    for _ in range(2):
        bounded = BoundedTokenizer(
            tokenizer, None, 100_000, "messages", Preparations().begin(), facts
        )
        bounded.apply_chat_template(messages, tokenize=False)
        counts.append(len(rendered))
        rendered.clear()
    assert counts[0] > counts[1] == 1


def test_facts_may_be_dropped_by_another_thread_at_any_time(folder):
    class Dropping(dict):
        def __setitem__(self, key, value):
            pass

    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = STRICT
    bounded = BoundedTokenizer(
        tokenizer, None, 10_000, "messages", Preparations().begin(), {False: Dropping()}
    )
    messages = parse_messages({"messages": [*HISTORY[:3], system("t"), user("v")]})
    text = bounded.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert text == "<system>s\n\nt<user>u<assistant>a<user>v<assistant>"


@pytest.mark.parametrize(
    "template, messages",
    [
        (IN_TURN, [user("u" * 200)] * 10_000),
        (IN_TURN, [system("s" * 200)] * 9_999 + [user("u")]),
        (
            ONE_CALL,
            [
                assistant("", *((f"f{i}", "{}") for i in range(10_000))),
                *(tool("r", f"f{i}") for i in range(9_998, -1, -1)),
            ],
        ),
    ],
)
def test_time_to_shape_a_history_does_not_grow_with_its_square(template, messages):
    def render(messages):
        environment = Environment()
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(template).render(messages=messages)
        except TemplateError:
            return None

    def refuse(reason):
        raise TemplateError(reason)

    shape = TemplateShape(template, {}, render)
    messages = parse_messages({"messages": messages})
    start = time.thread_time()
    shape.shape(messages)
    assert time.thread_time() - start < 3


def test_template_of_upstream_that_wants_text_gets_it(render):
    text = render(deepseek_v32.apply_chat_template, *ASKED, user("v")).prompt
    assert 'invoke name="ls"' in text and 'name="a" string="true">b<' in text
    assert "<result>r</result>" in text


LATE = [*HISTORY, assistant("b"), system("t"), user("w")]
SHAPED = "<system>s\n\nt<user>u<assistant>a<user>v<assistant>b<user>w<assistant>"


@pytest.mark.parametrize(
    "body, end",
    [
        ({"enable_thinking": False}, "</think>"),
        ({"enable_thinking": True, "reasoning_effort": "low"}, "<think>"),
        ({"reasoning_effort": "none"}, "</think>"),
    ],
)
def test_template_that_is_a_function_need_not_know_all_fields(body, end, render):
    template = deepseek_v32.apply_chat_template
    assert render(template, user("u"), **body).prompt.endswith(end)
    with pytest.raises(TypeError, match="thinking"):
        render(template, user("u"), chat_template_kwargs={"thinking": False})


@pytest.mark.parametrize("argv", [(), ALONE])
def test_request_that_is_served_alone_has_the_same_prompt(argv, start_server):
    _, port = start_server("llama", "--chat-template", STRICT, *argv)
    status, answer = call(port, "POST", CHAT, {"messages": LATE, "max_tokens": 2})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(SHAPED)


def test_request_with_images_gets_the_shape_of_the_template(model_folder):
    model = ServedModel(
        None, load_tokenizer(model_folder()), 259, None, 999, True, None
    )
    model.tokenizer.chat_template = STRICT
    texts = []

    def processor(text, images):
        texts.append(text)
        return text, []

    processor.image_token = "x"
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    messages = parse_messages({"messages": [*LATE, assistant("c"), user([image])]})
    args = SimpleNamespace(**DEFAULTS)
    request = Request(
        id="",
        args=make_generation_arguments({}, args),
        body={},
        arrival=0,
        model=model,
        completion=CompletionRequest("chat", "", messages, None, None),
    )
    provider = SimpleNamespace(
        cli_args=SimpleNamespace(chat_template_args={}), processor=processor
    )
    SingleGenerator(provider, request=request)._tokenize(
        model.tokenizer, request.completion, request.args
    )
    assert texts[0].startswith(SHAPED + "c<user>")


def test_model_without_a_template_gets_texts(render):
    mapping = {"user": "U:", "assistant": "A:", "system": "S:", "stop": ";"}
    text = render(
        None,
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {**assistant("", LS), "content": None},
        user("v"),
        role_mapping=mapping,
    ).prompt
    said = '{"name": "ls", "arguments": {"a": "b"}}'
    assert text.removeprefix("<bos>") == f"S:d;U:u;A:{said};U:v;A:"
    mapping["developer"] = "D:"
    text = render(
        None, {"role": "developer", "content": "d"}, role_mapping=mapping
    ).prompt
    assert text.removeprefix("<bos>") == "D:d;A:"


# The start of the answer

# Without the end of a message, no start of another would be common to two prompts.
TURN = MESSAGE + "."
THINKS = "<assistant><think>-"
THINKING = loop(TURN, "{% if add_generation_prompt %}" + THINKS + "{% endif %}")
QUIET = loop(
    TURN, "{% if add_generation_prompt %}<assistant><think>\n\n</think>{% endif %}"
)
ALWAYS = loop(TURN, THINKS)
SAYS = [user("what is <think>"), user("</think><think>"), user("<think>")]


@pytest.mark.parametrize("said", SAYS)
@pytest.mark.parametrize(
    "template, state",
    [
        (loop(TURN), "normal"),
        (QUIET, "normal"),
        (THINKING, "reasoning"),
        (ALWAYS, "reasoning"),
        (loop(TURN, "<assistant>"), "normal"),
    ],
)
def test_only_what_the_template_adds_starts_a_reasoning(template, state, said, render):
    made = render(template, system("s"), said)
    assert made.state == state
    tail = {THINKING: "<think>-", ALWAYS: "<think>-", QUIET: "<think>\n\n</think>"}
    if template in tail:
        assert made.segments[-1] == tail[template]
        assert made.types == ["system", "user", "assistant"]
    else:
        assert made.segments[0] == "<system>s.<user>"
        assert made.types == ["system", "user"]


def test_what_a_developer_says_is_a_segment_like_that_of_the_system(render):
    made = render(loop(TURN), {"role": "developer", "content": "d"}, user("u"))
    assert (made.segments[0], made.types) == ("<system>d.<user>", ["system", "user"])


@pytest.mark.parametrize("last", [tool("<think>", "ls"), assistant("a <think> b")])
def test_the_last_message_may_be_of_any_role(last, render):
    for template, state in ((loop(), "normal"), (THINKING, "reasoning")):
        made = render(template, user("u"), assistant("", LS), last)
        assert made.state == state
        cut = ["user", "assistant"]
        assert made.types == (cut if state == "reasoning" else ["assistant"])


def test_reasoning_that_the_template_starts_early_is_a_segment(render):
    end = THINKS + "I begin with what is asked here."
    made = render(
        loop(end="{% if add_generation_prompt %}" + end + "{% endif %}"), SAYS[0]
    )
    assert made.state == "reasoning"
    assert made.segments[-1] == end.removeprefix("<assistant>")


def test_state_is_known_after_calls_whose_content_is_null(render):
    template = loop(
        "{% if m.content is none %}{% for t in m.tool_calls %}"
        "[{{ t.function.name + t.function.arguments }}]{% endfor %}{% else %}"
        + MESSAGE
        + "{% endif %}",
        "<assistant>",
    )
    made = render(template, user("<think>"), assistant("", LS))
    assert made.state == "normal"


def test_template_that_needs_the_start_of_an_answer_decides_by_what_follows(render):
    template = (
        ALWAYS
        + "{% if not add_generation_prompt %}{{ raise_exception('x') }}{% endif %}"
    )
    assert render(template, SAYS[0]).state == "reasoning"


# Fields of the request


@pytest.mark.parametrize(
    "body, expected",
    [
        ({}, "on:"),
        ({"enable_thinking": False}, "off:"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "off:"),
        (
            {
                "enable_thinking": False,
                "chat_template_kwargs": {"enable_thinking": True},
            },
            "on:",
        ),
        ({"reasoning_effort": "high"}, "on:high"),
        ({"reasoning_effort": "none"}, "off:none"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "on:none"),
    ],
)
def test_fields_of_their_own_are_variables_of_the_template(body, expected, render):
    template = "{{ 'on' if enable_thinking else 'off' }}:{{ reasoning_effort }}"
    assert render(template, user("u"), **body).prompt == expected


def test_enable_thinking_is_also_known_by_its_other_name(render):
    template = "{{ thinking }}"
    assert render(template, user("u"), enable_thinking=False).prompt == "False"
    assert render(template, user("u"), reasoning_effort="none").prompt == "False"


def test_answer_may_go_on_with_the_last_message(render):
    history = [user("u"), assistant("Once upon")]
    for fields in (
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"chat_template_kwargs": {"continue_final_message": True}},
    ):
        made = render(loop(MESSAGE + "<|im_end|>"), *history, **fields)
        assert made.prompt == "<user>u<|im_end|><assistant>Once upon"
        assert made.state == "normal"


@pytest.mark.parametrize(
    "said, state",
    [("<think>I", "reasoning"), ("<think>I</think>A", "normal"), ("A", "normal")],
)
def test_answer_that_goes_on_is_in_the_state_of_its_message(said, state, render):
    for template in (loop(), THINKING, ALWAYS):
        made = render(template, *SAYS, assistant(said), continue_final_message=True)
        assert (made.state, made.prompt.endswith(said)) == (state, True)
    template = loop(
        "<{{ m.role }}>{% if m.role == 'assistant' %}<think>{% endif %}{{ m.content }}"
    )
    made = render(template, user("u"), assistant("I"), continue_final_message=True)
    assert made.state == "reasoning"


def test_prompt_may_end_without_the_start_of_an_answer(render):
    for fields in (
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
    ):
        made = render(THINKING, SAYS[0], **fields)
        assert made.prompt == "<user>what is <think>."
        assert made.state == "normal"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, None),
        ({"continue_final_message": "x"}, "continue_final_message"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": 1}},
            "add_generation_prompt",
        ),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"reasoning_effort": 1}, "reasoning_effort"),
    ],
)
def test_wrong_fields_are_refused(body, param, render):
    with pytest.raises(RequestError) as error:
        render(loop(), user("u"), assistant("a"), **body)
    assert error.value.param == (param or "continue_final_message")


def test_message_that_cannot_go_on_is_a_clear_error(start_server):
    _, port = start_server("llama", "--chat-template", loop())
    body = {"messages": [user("u"), {"role": "assistant", "content": "a"}]}
    body |= {"max_tokens": 2, "continue_final_message": True}
    assert call(port, "POST", CHAT, body)[0] == 200
    _, port = start_server("llama", "--chat-template", "{{ messages[0].content }}")
    status, answer = call(port, "POST", CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "continue_final_message" in answer["error"]["message"]


# The beginning of the text


def test_prompt_begins_with_one_beginning_of_text(folder):
    tokenizer = load_tokenizer(folder)
    bos = tokenizer.bos_token_id

    class Adding:
        """Begins each text, as the tokenizers of Llama do."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, add_special_tokens=True):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            return [bos] * add_special_tokens + tokens

    bounded = BoundedTokenizer(Adding(), None, 10_000, "prompt", Preparations().begin())
    plain = bounded.encode("a<bos>b")
    assert plain[0] == bos and plain.count(bos) == 2
    assert bounded.encode("<bos>a<bos>b") == plain
    assert bounded.encode("<bos><bos>a<bos>b") == plain
    assert bounded.encode("<bos>") == [bos] == bounded.encode("")
    text = bounded.apply_chat_template(
        parse_messages({"messages": [user("<bos>u")]}), chat_template="<bos>" + TEMPLATE
    )
    assert text[0] == bos
